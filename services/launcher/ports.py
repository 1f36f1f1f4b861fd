"""Finds free ports on loopback."""

from __future__ import annotations

import errno
import random
import socket
from itertools import islice

# Below the range from which Linux takes ports for outgoing connections, so that no such connection takes a remembered port.
_RANGE = range(20_000, 30_000)


def is_free(port: int) -> bool:
    """Return whether no program listens on the port, on loopback or on all interfaces."""
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports of connections that have just ended count as free
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False
                raise
    return True


def choose(count: int, *, taken: set[int] | None = None, source: random.Random | None = None) -> list[int]:
    """Return ``count`` different ports that are free now and not in ``taken``. Raises RuntimeError if there are too few."""
    ports = (source or random.SystemRandom()).sample(_RANGE, len(_RANGE))
    chosen = list(islice((port for port in ports if port not in (taken or ()) and is_free(port)), count))
    if len(chosen) < count:
        raise RuntimeError(f"no {count} free ports from {_RANGE.start} to {_RANGE.stop - 1}")
    return chosen
