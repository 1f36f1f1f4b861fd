"""The state of a service between commands: a JSON file in its folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from services.launcher.errors import ServiceError


@dataclass(frozen=True)
class Recorded:
    """A started process: its pid, and its start in seconds since 1970."""

    pid: int
    started_at: float


@dataclass(frozen=True)
class State:
    """The ports by use, which stay when the service stops, and the processes by role in the order of their start, which do not."""

    version: str
    ports: dict[str, int]
    processes: dict[str, Recorded] = field(default_factory=dict)


def read_state(path: Path) -> State | None:
    """Return the state; None without a file. Raises ServiceError if the file is not a state."""
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        processes = {role: Recorded(int(one["pid"]), float(one["started_at"])) for role, one in data["processes"].items()}
        ports = {str(use): int(port) for use, port in data["ports"].items()}
        if not all(0 < port < 65536 for port in ports.values()):
            raise ValueError("a port is out of range")
        return State(str(data["version"]), ports, processes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServiceError(f"{path} cannot be read: {error!r}", hint="delete it; ports are then chosen anew") from None


def write_state(path: Path, state: State) -> None:
    """Write the state atomically: a reader sees the old file or the new one."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(state), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
