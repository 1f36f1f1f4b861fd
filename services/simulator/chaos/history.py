"""A history: the steps of one run as data, drawn from a seed, which can be written as JSON and replayed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from services.simulator.errors import SimulationError


@dataclass(frozen=True)
class Step:
    """One step: the name of its kind in the registry, and its arguments."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.arguments.items() if value not in (None, False))
        return f"{self.name} ({told})" if told else self.name


@dataclass(frozen=True)
class History:
    """The steps of a run, the seed of its traffic, and the settings of its home. ``builds_marts``: also at the end.

    With ``in_store`` the lakehouse lies in an object store, so that the machine with the home may be lost.
    """

    seed: int
    steps: tuple[Step, ...]
    files_per_batch: int = 2
    split_bytes: int = 16 * 1024 * 1024
    builds_marts: bool = False
    in_store: bool = False

    def with_steps(self, steps: tuple[Step, ...]) -> History:
        """Return the same history with other steps."""
        return replace(self, steps=steps)

    def write(self, path: Path) -> None:
        """Write the history as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")


def read_history(path: Path) -> History:
    """Read a history that `History.write` wrote. Raises SimulationError if the file is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
        steps = tuple(Step(step["name"], dict(step["arguments"])) for step in found.pop("steps"))
        return History(steps=steps, **found)
    except OSError as error:
        raise SimulationError(f"{path} cannot be read: {error.strerror}", hint="name a file that adtally chaos wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SimulationError(f"{path} is no history", hint="name a file that adtally chaos wrote") from None
