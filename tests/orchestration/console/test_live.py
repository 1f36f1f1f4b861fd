"""The live figures, commit by commit, beside what a whole reading of the tables gives."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestration.console import live
from orchestration.console.live import LiveFigures
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS
from tests.orchestration.marts.delta_files import commit, utc
from tests.orchestration.marts.lakes import first_batch, increment, late_batch, ledger_row

_SUMS = "sum(impressions)::bigint, sum(clicks)::bigint, sum(invalid_clicks)::bigint, sum(spend_nanos)::bigint"
_BY_DAY = f"select event_minute::date, {_SUMS} from minutes group by 1 order by 1"
FIRST = [(date(2026, 3, 10), 4, 2, 0, 2500), (date(2026, 3, 11), 0, 0, 1, 0)]
LATE = [(date(2026, 3, 10), 4, 3, 0, 3000), FIRST[1]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path)


@pytest.fixture
def figures(settings: Settings) -> Iterator[LiveFigures]:
    made = LiveFigures(settings)
    yield made
    made.close()


def lake_of(settings: Settings) -> Path:
    return Path(settings.lakehouse_uri)


def by_day(figures: LiveFigures) -> list[tuple[Any, ...]]:
    """The figures as they are shown, which must be what a reading of everything gives."""
    found = [tuple(row.values()) for row in figures.rows(_BY_DAY)]
    anew = LiveFigures(load_settings(home=figures._lake.settings.home))
    try:
        anew.refresh()
        assert found == [tuple(row.values()) for row in anew.rows(_BY_DAY)]
    finally:
        anew.close()
    return found


def test_before_the_first_batch_a_problem_says_what_to_do(figures: LiveFigures) -> None:
    assert "adtally ingest" in figures.refresh().problem
    assert figures.rows(_BY_DAY) == []


def test_a_batch_shows_once_its_ledger_is_committed_and_not_before(settings: Settings, figures: LiveFigures) -> None:
    first_batch(lake_of(settings))
    first = figures.refresh()
    assert (first.ledger, first.days, by_day(figures)) == (0, (date(2026, 3, 10), date(2026, 3, 11)), FIRST)

    late_batch(lake_of(settings), with_ledger=False)
    half = figures.refresh()
    assert (half.ledger, half.metrics, by_day(figures)) == (0, 1, FIRST)

    commit(lake_of(settings), BATCH_LEDGER, [])
    assert figures.refresh().ledger == 1
    assert by_day(figures) == FIRST

    commit(lake_of(settings), BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=1, ingested_at=utc("2026-03-10T13:00"))])
    whole = figures.refresh()
    assert by_day(figures) == LATE
    assert (whole.ledger, whole.ingested_at) == (2, utc("2026-03-10T13:00").replace(tzinfo=None))


def test_a_correction_of_a_complete_batch_counts_at_once(settings: Settings, figures: LiveFigures) -> None:
    first_batch(lake_of(settings))
    figures.refresh()
    commit(lake_of(settings), MINUTE_METRICS, [increment("r1", 0, "2026-03-10T10:05", clicks=-1, spend_nanos=-1250, _run_id="run")])
    figures.refresh()
    assert by_day(figures) == [(date(2026, 3, 10), 4, 1, 0, 1250), FIRST[1]]


def test_only_the_newest_days_are_kept(settings: Settings, figures: LiveFigures) -> None:
    first_batch(lake_of(settings))
    figures.refresh()
    commit(lake_of(settings), MINUTE_METRICS, [increment("n1", 1, "2026-03-13T00:00", clicks=7)])
    commit(lake_of(settings), BATCH_LEDGER, [ledger_row(1, "2026-03-13T00:00", accepted=7)])
    assert figures.refresh().days == (date(2026, 3, 13),)
    assert by_day(figures) == [(date(2026, 3, 13), 0, 7, 0, 0)]


def test_the_figures_are_the_same_when_rows_are_summed_up_and_when_too_many_commits_are_read_anew(
    settings: Settings, figures: LiveFigures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_FOLD_ROWS", 3)
    monkeypatch.setattr(live, "_COMMITS", 2)
    first_batch(lake_of(settings))
    figures.refresh()
    for number in range(1, 5):
        minute = f"{utc('2026-03-11T00:00') + timedelta(minutes=number % 2):%Y-%m-%dT%H:%M}"
        commit(lake_of(settings), MINUTE_METRICS, [increment(f"f{number}", number, minute, clicks=1, spend_nanos=10**18)])
        commit(lake_of(settings), BATCH_LEDGER, [ledger_row(number, "2026-03-11T00:00", accepted=1)])
        if number < 3:  # the last two are read together
            figures.refresh()
    commit(lake_of(settings), BATCH_LEDGER, [])
    figures.refresh()
    assert by_day(figures) == [FIRST[0], (date(2026, 3, 11), 0, 4, 1, 4 * 10**18)]


def test_a_lakehouse_that_is_made_anew_and_one_that_is_damaged(settings: Settings, figures: LiveFigures) -> None:
    first_batch(lake_of(settings))
    late_batch(lake_of(settings))
    assert figures.refresh().ledger == 1
    for table in (MINUTE_METRICS, BATCH_LEDGER):
        folder = lake_of(settings) / table.name
        folder.rename(folder.with_name(f"{table.name}-old"))
    for table in (MINUTE_METRICS, BATCH_LEDGER):
        rows = [increment("x", 0, "2026-03-10T10:05", clicks=9)] if table is MINUTE_METRICS else [ledger_row(0, "2026-03-10T10:00")]
        commit(lake_of(settings), table, rows)
    figures.refresh()
    assert by_day(figures) == [(date(2026, 3, 10), 0, 9, 0, 0)]

    (lake_of(settings) / "batch_ledger/_delta_log/00000000000000000001.json").write_bytes(b"")
    (lake_of(settings) / "batch_ledger/_delta_log/00000000000000000002.json").write_bytes(b"{}")
    assert figures.refresh().problem
    assert Lake(settings).exists(MINUTE_METRICS)


def test_a_question_before_the_first_reading_has_ended_has_no_answer_yet(
    settings: Settings, figures: LiveFigures, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_batch(lake_of(settings))
    load, asked = LiveFigures._load, list[list[Any]]()

    def ask_first(self: LiveFigures, *arguments: Any) -> None:
        asked.append(self.rows(_BY_DAY))
        load(self, *arguments)

    monkeypatch.setattr(LiveFigures, "_load", ask_first)
    figures.refresh()
    assert asked == [[]]
    assert [tuple(row.values()) for row in figures.rows(_BY_DAY)] == FIRST
