"""The mutation tests themselves: which changes they make, and that they see a test that notices nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.operators import mutants

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("x = a < b", ["x = a <= b"]),
        ("x = a < b < c", ["x = a <= b < c", "x = a < b <= c"]),
        ("x = a + 1", ["x = a - 1", "x = a + 2"]),
        ("x = not a and b", ["x = not a or b", "x = a and b"]),
        ("x: int = True", ["x: int = False"]),
        ("if a:\n    b()", ["if not a:", "pass"]),
        ("self._progress('far')", []),
        ("def f(a: int = 3) -> 'x < y':\n    'doc'\n    raise E(4)", ["def f(a: int=4) -> 'x < y':"]),
        ("x = 'select a from t where b is null'", ["x = 'select a from t where b is not null'"]),
        (
            "x = f'select {a} from t where b >= {1}'",
            ["x = f'select {a} from t where b > {1}'", "x = f'select {a} from t where b >= {2}'"],
        ),
        ("x = 'a < b'", []),
    ],
)
def test_changes_of_a_statement(source: str, changes: list[str]) -> None:
    assert [mutant.after for mutant in mutants(source)] == changes


def test_a_change_that_no_test_notices_is_told(tmp_path: Path) -> None:
    (tmp_path / "weak.py").write_text("def is_adult(age):\n    return age >= 18\n\n\ndef half(number):\n    return number // 2\n")
    (tmp_path / "test_weak.py").write_text(
        "from weak import is_adult\n\n\ndef test_is_adult():\n    assert is_adult(30)\n    assert not is_adult(17)\n"
    )
    command = [sys.executable, "-m", "tests.mutation", "--root", str(tmp_path), "weak.py", "--tests", "test_weak.py", "--json"]
    run = subprocess.run([*command, "--at-least", "90"], cwd=PROJECT, capture_output=True, text=True, timeout=300)
    found = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == 1, run.stderr
    assert [(one["after"], one["outcome"]) for one in found["open"]] == [
        ("return age > 18", "survived"),
        ("return age >= 19", "survived"),
        ("return number * 2", "survived"),
        ("return number // 3", "survived"),
    ]
