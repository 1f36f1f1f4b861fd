"""A quarantined file is read again when an operator releases it: once, and visibly."""

from __future__ import annotations

import os
from pathlib import Path

import correct
import lake
import pytest
from local import LocalEvents

from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.errors import UsageError
from spark_jobs.ingest import release
from spark_jobs.ingest.release import read_quarantine, release_file
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.status import read_status

NAME = "events/eu-west/local-0000.jsonl"


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    found = load_settings(home=tmp_path / "home", max_rejects_per_file=10)
    ensure_tables(found)
    lake.campaigns(found)
    assert LocalEvents(found).take_content(b"{}\n" * 300 + lake.lines([lake.event("a")])).rejected == 1
    return found


def _release(home: Settings) -> str:
    return release_file(home, NAME, reason="the limit is raised", released_by="me")


def test_a_released_file_is_read_once(home: Settings) -> None:
    (one,) = read_quarantine(home)
    assert (one.source_file, one.reason, one.cause) == (NAME, "too_many_rejects", "300 of the first 301 records are rejected")
    name = _release(home)
    assert name.startswith("events/eu-west/local-0000.released-local-0")
    assert [one.released_as for one in read_quarantine(home)] == [name]
    assert read_status(home).quarantined_files == []
    with pytest.raises(UsageError, match="released already"):
        _release(home)
    decided = "source_file, released_as, quarantine_reason, reason, released_by"
    assert correct.rows(home, f"select {decided} from releases") == [(NAME, name, "too_many_rejects", "the limit is raised", "me")]
    # the next batch takes it, by other limits
    higher = load_settings(home=home.home_path, max_rejects_per_file=1000)
    batches = LocalEvents(higher, "next")
    batches.take_landed([higher.landing_path / name])
    sums = "sum(offered)::bigint, sum(accepted)::bigint, sum(rejected)::bigint"
    assert correct.rows(home, f"select {sums} from batch_ledger") == [(302, 1, 301)]
    assert read_status(home).conservation_holds
    assert not reconcile(home, None).differences


def test_a_release_that_was_killed_is_done_by_the_next(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(release, "Lake", killed)
        with pytest.raises(Killed):
            _release(home)
    assert len(read_status(home).quarantined_files) == 1
    _release(home)
    assert sorted(path.name for path in (home.landing_path / "events/eu-west").iterdir()) == [
        "local-0000.jsonl",
        "local-0000.released-local-0.jsonl",
    ]
    assert read_status(home).quarantined_files == []


def test_a_file_system_without_links_gets_a_copy(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    assert (home.landing_path / _release(home)).read_bytes() == (home.landing_path / NAME).read_bytes()


def test_what_cannot_be_released(home: Settings) -> None:
    with pytest.raises(UsageError, match="is not quarantined"):
        release_file(home, "events/eu-west/other.jsonl", reason="r", released_by="me")
    with pytest.raises(UsageError, match="a reason and a name are needed"):
        release_file(home, NAME, reason=" ", released_by="me")
    (home.landing_path / NAME).unlink()
    with pytest.raises(UsageError, match="is not there any more"):
        _release(home)
    assert correct.rows(home, "select * from releases") == []
