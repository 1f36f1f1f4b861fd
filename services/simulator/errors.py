"""The errors of the simulator."""

from __future__ import annotations

from services.errors import HintedError


class SimulationError(HintedError, ValueError):
    """Arguments that cannot be right, or an output folder that already holds something."""

    exit_code = 2


class DeliveryError(HintedError, RuntimeError):
    """A cluster did not take all records. Sending them again is safe: they have the same ids."""

    retryable = True
