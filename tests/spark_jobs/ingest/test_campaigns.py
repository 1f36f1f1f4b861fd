"""Campaign files: what is read, and which file, line and rule an error names."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from spark_jobs.errors import CampaignFileError
from spark_jobs.ingest.campaigns import COLUMNS, Campaign, read_campaigns
from spark_jobs.units import to_micros

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[2] / "cases" / "campaigns" / "read.json").read_text("utf-8")
)["cases"]
READ = [case for case in CASES if "gives" in case]
REFUSED = [case for case in CASES if "error" in case]


def land(landing: Path, case: dict[str, Any]) -> None:
    folder = landing / "campaigns"
    folder.mkdir()
    for name, lines in case["files"].items():
        header = case.get("header", ",".join(COLUMNS))
        (folder / name).write_bytes("".join(f"{line}\n" for line in (header, *lines)).encode())


def micros(text: str | None) -> int | None:
    return None if text is None else to_micros(datetime.fromisoformat(text))


def campaign(values: list[Any]) -> Campaign:
    campaign_id, store_id, billing_model, budget, currency, valid_from, valid_to, source_file = values
    begin = micros(valid_from)
    assert begin is not None
    return Campaign(campaign_id, begin, store_id, billing_model, budget, currency, micros(valid_to), source_file)


@pytest.mark.parametrize("case", READ, ids=lambda case: case["name"])
def test_files_that_are_read(tmp_path: Path, case: dict[str, Any]) -> None:
    land(tmp_path, case)
    expected = [campaign(values) for values in case["gives"]]
    assert read_campaigns(tmp_path) == expected
    assert read_campaigns(tmp_path) == expected, "reading changes nothing"


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_files_that_are_refused(tmp_path: Path, case: dict[str, Any]) -> None:
    land(tmp_path, case)
    with pytest.raises(CampaignFileError) as refused:
        read_campaigns(tmp_path)
    assert str(refused.value).startswith(case["error"])
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 1


def test_without_the_folder_there_is_no_campaign(tmp_path: Path) -> None:
    assert read_campaigns(tmp_path) == []


@pytest.mark.parametrize(("length", "refused"), [(128, False), (129, True)])
def test_the_length_of_an_id(tmp_path: Path, length: int, refused: bool) -> None:
    land(tmp_path, {"files": {"a.csv": [f"{'é' * length},s,cpc,1,EUR,2025-01-01,"]}})
    if refused:
        with pytest.raises(CampaignFileError, match="campaign_id must have 1 to 128 characters"):
            read_campaigns(tmp_path)
    else:
        assert [c.campaign_id for c in read_campaigns(tmp_path)] == ["é" * length]


@pytest.mark.parametrize("content", [b"\xff\xfec\0a\0", b"campaign_id,store_id\nCaf\xe9,s\n"], ids=["UTF-16", "Latin-1"])
def test_a_file_in_another_encoding(tmp_path: Path, content: bytes) -> None:
    land(tmp_path, {"files": {}})
    header = b"" if content.startswith(b"\xff") else f"{','.join(COLUMNS)}\n".encode()
    (tmp_path / "campaigns" / "a.csv").write_bytes(header + content)
    with pytest.raises(CampaignFileError, match=r"^campaigns/a.csv: cannot be read as CSV in UTF-8: "):
        read_campaigns(tmp_path)


def test_a_file_with_a_value_without_end(tmp_path: Path) -> None:
    land(tmp_path, {"files": {"a.csv": [f'"{"x" * 200_000}']}})
    with pytest.raises(CampaignFileError, match=r"^campaigns/a.csv: cannot be read as CSV in UTF-8: field larger than"):
        read_campaigns(tmp_path)


def test_what_is_no_regular_file_is_not_read_and_hangs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "campaigns"
    folder.mkdir()
    odd = folder / "odd.csv"
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to(tmp_path / "nothing")):
        make(odd)
        assert read_campaigns(tmp_path) == []  # status names it, see tests/spark_jobs/ingest/files/test_backlog.py
        odd.rmdir() if odd.is_dir() else odd.unlink()
