"""What is remembered between commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.launcher.errors import ServiceError
from services.launcher.state import Recorded, State, read_state, write_state


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = State("1.2", {"broker": 20001, "controller": 65535}, {"zookeeper": Recorded(1, 1.5), "pinot": Recorded(2, 2.5)})
    write_state(tmp_path / "state.json", state)
    assert read_state(tmp_path / "state.json") == state
    assert list(read_state(tmp_path / "state.json").processes) == ["zookeeper", "pinot"]  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_no_file_is_no_state(tmp_path: Path) -> None:
    assert read_state(tmp_path / "state.json") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": "1"}',
        '{"version": "1", "ports": {"broker": "x"}, "processes": {}}',
        '{"version": "1", "ports": {"broker": 0}, "processes": {}}',
        '{"version": "1", "ports": {"broker": 65536}, "processes": {}}',
        '{"version": "1", "ports": {}, "processes": {"kafka": {"pid": 1}}}',
        '{"version": "1", "ports": {}, "processes": []}',
    ],
)
def test_a_broken_file_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ServiceError, match=r"state\.json cannot be read.*delete it"):
        read_state(path)
