"""Free ports."""

from __future__ import annotations

import random
import socket

import pytest

from services.launcher.ports import choose, is_free


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_with_a_listener_is_not_free(host: str) -> None:
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not is_free(port)
    assert is_free(port)


def test_ports_are_different_free_and_not_those_taken() -> None:
    first = choose(5, source=random.Random(1))
    assert len(set(first)) == 5
    assert all(20_000 <= port < 30_000 and is_free(port) for port in first)
    assert not set(choose(5, taken=set(first), source=random.Random(1))) & set(first)


def test_a_port_in_use_is_passed_over() -> None:
    wanted = choose(1, source=random.Random(2))[0]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", wanted))
        listener.listen()
        assert choose(1, source=random.Random(2))[0] != wanted


def test_too_many_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no 10001 free ports"):
        choose(10_001)
