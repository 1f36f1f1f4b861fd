"""Ad traffic with a known truth: `simulate` writes a landing folder and says what it must come to."""

from __future__ import annotations

from services.simulator.errors import SimulationError
from services.simulator.simulate import simulate
from services.simulator.traffic import SimulationShares
from services.simulator.truth import Truth

__all__ = ["SimulationError", "SimulationShares", "Truth", "simulate"]
