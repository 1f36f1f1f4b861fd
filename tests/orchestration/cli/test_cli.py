"""The command ``adtally``: what it prints, where, and with which exit status."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
import terminal
from terminal import Done, environment

import spark_jobs.ingest.runner as ingest_module
import spark_jobs.operate.status as status_module
from orchestration.cli import app, demo_report, doctor
from orchestration.marts.render import render
from spark_jobs import jars, java
from spark_jobs.errors import BusyError, ConservationError, MachineError
from spark_jobs.ingest.batch import BatchReport, IngestReport
from spark_jobs.jars import LOCK_FILE
from spark_jobs.operate.status import NOTHING_INGESTED
from tests.orchestration.marts.lakes import first_batch

Adtally = Callable[..., Done]


@pytest.fixture
def adtally(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Adtally:
    """Run the command in this process, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        status = app.run([str(argument) for argument in arguments])
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture
def marts(tmp_path: Path) -> Path:
    """A home with published marts of one table."""
    home = tmp_path / "home"
    (home / "marts").mkdir(parents=True)
    with duckdb.connect(str(home / "marts" / "marts.duckdb")) as connection:
        connection.execute("create table fct as select range as n from range(50000)")
        connection.execute("create table mart_build (mart_group text, build_id text, built_at timestamp, table_name text)")
        for group, build, hour in (("hourly", "b1", 8), ("near_real_time", "b2", 9)):
            for table in ("events", "orders"):
                connection.execute("insert into mart_build values (?, ?, ?, ?)", [group, build, datetime(2026, 3, 10, hour), table])
    return home


# Wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope' (see `adtally --help`)"),
        (["--jsn"], "No such option: --jsn"),
        (["status", "--jsn"], "(see `adtally status --help`)"),
        (["status", "more"], "(see `adtally status --help`)"),
        (["query"], "a query is a statement or --named NAME (`adtally query --list` lists the named ones)"),
        (["query", "select 1", "--format", "xml"], "'--format'"),
        (["marts", "nope"], "No such command 'nope' (see `adtally marts --help`)"),
        (["simulate", "--events", "5"], "Missing option '--out'"),
        (["simulate", "--out", "x", "--events", "many"], "'--events'"),
        (["simulate", "--out", "x", "--events", "0"], "'--events'"),
        (["simulate", "--out", "x", "--events", "5", "--seed", "-1"], "'--seed'"),
        (
            ["simulate", "--out", "x", "--events", "5", "--start", "yesterday"],
            "--start 'yesterday' is not a time (as in 2025-06-02",
        ),
        (["simulate", "--out", "x", "--events", "5", "--start", "2025-02-30"], "--start '2025-02-30' is not a time"),
        (["simulate", "--out", "x", "--events", "5", "--start", "2025-06-02T08:00"], "has no zone (as in 2025-06-02T08:00:00Z)"),
        (["simulate", "--out", "x", "--events", "5", "--mirror", "0.5"], "these options are for Kafka (add --to kafka)"),
        (["simulate", "--to", "kafka", "--events", "5"], "no Kafka is configured (name it with --bootstrap-servers"),
        (["simulate", "--to", "kafka", "--events", "5", "--bootstrap-servers", "No Name=host:1"], "is not REGION=HOST:PORT"),
        (
            ["simulate", "--to", "kafka", "--events", "5", "--bootstrap-servers", "a=h:1", "--mirror", "1"],
            "a mirror needs two clusters",
        ),
        (
            ["simulate", "--to", "kafka", "--events", "5", "--bootstrap-servers", "a=h:1", "--clock-ahead", "b"],
            "not REGION=SECONDS",
        ),
        (["simulate", "--out", "x", "--events", "5", "--days", "0"], "days must be more than 0"),
        (["simulate", "--out", "x", "--events", "5", "--days", "nan"], "days must be more than 0"),
        (["simulate", "--out", "x", "--events", "5", "--days", "1", "--rate", "2"], "only one of days and rate"),
        (["simulate", "--out", "x", "--events", "5", "--days", "inf"], "--days inf is out of range"),
        (["simulate", "--out", "x", "--events", "5", "--rate", "1e-300"], "--rate 1e-300 would take more than 36,500 days"),
        (["simulate", "--out", "x", "--events", "5", "--rate", "inf"], "--rate inf is out of range"),
        (["simulate", "--out", "x", "--events", "5", "--start", "1969-12-31"], "--start '1969-12-31' is out of range"),
        (["simulate", "--out", "x", "--events", "5", "--start", "9999-12-31"], "--start '9999-12-31' is out of range"),
        (["simulate", "--out", "x", "--events", "5", "--start", "0001-01-01T00:00:00+10:00"], "is out of range"),
        (["ingest", "--trigger", "soon"], "--trigger 'soon' is not a time above 0 (as in 500ms, 5s or 2m"),
        (["ingest", "--trigger", "0s"], "--trigger '0s'"),
        (["demo", "--events", "0"], "'--events'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line_and_exit_status_2(adtally: Adtally, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = adtally(*arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.error
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize("arguments", [(), ("marts",), ("bench",)])
def test_without_a_command_the_help_is_shown(adtally: Adtally, arguments: tuple[str, ...]) -> None:
    done = adtally(*arguments)
    assert done.status == 2
    assert f"Usage: {' '.join(('adtally', *arguments))} [OPTIONS] COMMAND" in done.out + done.err
    assert "error" not in done.err


def test_a_long_message_is_cut_in_its_middle(adtally: Adtally) -> None:
    done = adtally("simulate", "--out", "x", "--events", "5", "--start", "long" * 1000)
    assert done.status == 2
    assert len(done.error) <= 600 and " ... " in done.error and done.error.endswith("2025-06-02T08:00:00Z)")


# Settings


COMMANDS = (["status"], ["query", "select 1"], ["ingest"], ["marts", "build"], ["demo"])


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_wrong_settings_are_named_on_one_line(adtally: Adtally, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setenv("ADTALLY_DRIVER_MEMORY", "lots")
    monkeypatch.setenv("ADTALLY_SHUFFLE_PARTITIONS", "0")
    done = adtally(*arguments)
    assert (done.status, done.out) == (2, "")
    assert "ADTALLY_DRIVER_MEMORY: " in done.error and "ADTALLY_SHUFFLE_PARTITIONS: " in done.error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ADTALLY_FUTURE_SKEW", "-5"),
        ("ADTALLY_HOUR_GRACE", "a while"),
        ("ADTALLY_MAX_BYTES_PER_BATCH", "1k"),
        ("ADTALLY_MAX_FILES_PER_BATCH", "0"),
        ("ADTALLY_SPLIT_BYTES", "1"),
        ("ADTALLY_EARLIEST_EVENT_TIME", "2020-01-01T00:00:00"),
    ],
)
def test_each_wrong_setting_is_refused(adtally: Adtally, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    done = adtally("status")
    assert done.status == 2
    assert done.error.startswith(f"wrong settings: {name}: ")
    assert "correct the environment variable" in done.error


@pytest.mark.parametrize("arguments", COMMANDS[:-1], ids=" ".join)
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_home_that_is_no_folder(
    adtally: Adtally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], place: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / place))
    done = adtally(*arguments)
    assert (done.status, done.out) == (2, "")
    assert f"{tmp_path / 'file'} is not a folder" in done.error


def test_home_is_the_option_then_the_variable_then_the_working_folder(
    adtally: Adtally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def home() -> str:
        checks = {check["name"]: check["detail"] for check in json.loads(adtally(*options, "doctor", "--json").out)["checks"]}
        return str(checks["settings"])

    monkeypatch.setattr(doctor, "_java", lambda: "")
    options: list[str] = []
    assert f"home {tmp_path / '.adtally'}, tables in {tmp_path / '.adtally' / 'lakehouse'}" in home()
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "variable"))
    assert f"home {tmp_path / 'variable'}, " in home()
    options = ["--home", "option"]
    assert f"home {tmp_path / 'option'}, " in home()
    options = []
    assert f"home {tmp_path / 'variable'}, " in home()  # the option of one call is not that of the next


# Errors


def test_the_data_failed_is_exit_status_1(adtally: Adtally, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ConservationError("5 offered, but 4 accounted for"), BusyError("another ingest runs")):
        monkeypatch.setattr(ingest_module, "run_ingest", _raises(error))
        done = adtally("ingest")
        assert (done.status, done.out, done.error) == (1, "", str(error))


def test_what_nobody_expected_is_one_line_too(adtally: Adtally, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "read_status", _raises(RuntimeError("first line\nsecond line")))
    done = adtally("status")
    assert (done.status, done.out) == (1, "")
    said = r"RuntimeError: first line second line at \S+\.py:\d+ \(run again as `adtally --debug \.\.\.` for the stack trace\)"
    assert re.fullmatch(said, done.error)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("odd"), 1), (MachineError("no Java"), 2)])
def test_debug_shows_the_trace_and_the_line(
    adtally: Adtally, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    monkeypatch.setattr(status_module, "read_status", _raises(error))
    done = adtally("--debug", "status")
    assert (done.status, done.out) == (status, "")
    first, *_, last = done.err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert "in _raise" in done.err
    assert last.startswith("adtally: error: ") and str(error) in last and "--debug" not in last
    assert "Traceback" not in adtally("status").err  # the next call is without


def _raises(error: Exception) -> Callable[..., Any]:
    def _raise(*_: object, **__: object) -> None:
        raise error

    return _raise


# simulate


def test_simulate_and_the_truth_it_names(adtally: Adtally, tmp_path: Path) -> None:
    done = adtally(
        "simulate", "--out", "traffic", "--events", "300", "--seed", "3", "--start", "2025-06-02T08:00:00+02:00", "--json"
    )
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    truth = json.loads((tmp_path / found["truth"]).read_text("utf-8"))
    assert found["totals"] == truth["totals"] and found["totals"]["offered"] == 300
    assert (found["seed"], truth["seed"]) == (3, 3)
    hours = [row["event_hour"] for row in truth["campaign_hours"]]
    assert min(hours) >= "2025-06-02T06:00:00Z"  # the zone was heard
    again = adtally("simulate", "--out", "again", "--events", "300", "--seed", "3", "--start", "2025-06-02T06:00:00Z")
    assert again.out.startswith("300 event lines in again: ") and again.err == ""
    assert (tmp_path / "again" / "truth.json").read_bytes() == (tmp_path / "traffic" / "truth.json").read_bytes()


def test_simulate_into_a_folder_that_holds_something(adtally: Adtally, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    done = adtally("simulate", "--out", "full", "--events", "5")
    assert (done.status, done.out) == (2, "")
    assert done.error == "full is not an empty folder (choose another, or remove what is in it)"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_simulate_where_nothing_can_be_written(adtally: Adtally, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = adtally("simulate", "--out", "file/below", "--events", "5")
    assert (done.status, done.out) == (2, "")
    assert "cannot be written: Not a directory" in done.error and "--out" in done.error


# ingest


BATCH = BatchReport("events", "q", 0, offered=10, accepted=6, duplicate=2, conflict=1, rejected=1, late=3, seconds=0.5)


@pytest.fixture
def ingest(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the job: two batches, and what it was called with."""
    seen = SimpleNamespace(batches=[BATCH, BATCH], options={})

    def run_ingest(
        settings: Any, *, progress: Callable[[BatchReport], None], notice: Callable[[str], None], **options: Any
    ) -> IngestReport:
        if options["continuous"]:
            notice("cluster eu-west answers again")
        seen.options = {"home": settings.home_path, **options}
        report = IngestReport()
        for batch in seen.batches:
            progress(batch)
            report = report.plus(batch)
        return report

    monkeypatch.setattr(ingest_module, "run_ingest", run_ingest)
    return seen


def test_ingest_prints_progress_and_the_sum(adtally: Adtally, tmp_path: Path, ingest: SimpleNamespace) -> None:
    (tmp_path / "here").mkdir()
    done = adtally("--home", "here", "ingest")
    assert done.status == 0
    assert done.out == "2 batches: 20 offered = 12 accepted + 4 duplicate + 2 conflict + 2 rejected; 6 of the accepted late\n"
    line = "events batch 0: 10 offered, 6 accepted, 2 duplicate, 1 conflict, 1 rejected, 3 late, 0.5 s\n"
    assert done.err == line * 2
    assert ingest.options == {"home": tmp_path / "here", "continuous": False, "trigger_seconds": None, "waits": False}


def test_ingest_with_json_prints_one_object(adtally: Adtally, ingest: SimpleNamespace) -> None:
    done = adtally("ingest", "--json")
    names = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")
    assert json.loads(done.out) == {"batches": 2, **{name: 2 * getattr(BATCH, name) for name in names}}


def test_continuous_ingest_with_json_prints_a_line_a_batch(adtally: Adtally, ingest: SimpleNamespace) -> None:
    done = adtally("ingest", "--continuous", "--trigger", "500ms", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["type"] for line in lines] == ["batch", "batch", "end"]
    assert (lines[0]["batch_id"], lines[0]["seconds"], lines[-1]["offered"]) == (0, 0.5, 20)
    assert done.err == "adtally: cluster eu-west answers again\n"
    assert (ingest.options["continuous"], ingest.options["trigger_seconds"]) == (True, 0.5)


def test_ingest_of_nothing(adtally: Adtally, ingest: SimpleNamespace) -> None:
    ingest.batches = []
    done = adtally("ingest")
    assert (done.status, done.out, done.err) == (0, "nothing new to ingest\n", "")


def test_ingest_without_java(tmp_path: Path) -> None:
    done = terminal.run("ingest", cwd=tmp_path, env=environment(JAVA_HOME=str(tmp_path / "no-jdk")))
    assert (done.status, done.out) == (2, "")
    assert str(tmp_path / "no-jdk") in done.error and java.INSTALL_JAVA in done.error


# marts build, query, status


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Done]]:
    """A home whose marts were built from tables that can be added up by hand, and what the command said."""
    home = tmp_path_factory.mktemp("built")
    first_batch(home / "lakehouse")
    yield home, terminal.run("--home", str(home), "marts", "build", "--json", cwd=home)


def test_marts_build_and_query(built: tuple[Path, Done], adtally: Adtally) -> None:
    home, done = built
    assert (done.status, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["versions"] == {
        "batch_ledger": 0,
        "minute_metrics": 0,
        "campaigns": 0,
        "reconciliations": 0,
        "events": 0,
        "restatements": 0,
        "attributed_orders": 0,
        "billing_lines": 0,
        "names": 0,
    }
    assert report["groups"] == ["near_real_time", "hourly"]
    assert report["rows"]["fct_campaign_day"] == 3
    assert report["path"] == str(home / "marts" / "marts.duckdb")
    assert datetime.fromisoformat(report["built_at"]).tzinfo is not None
    asked = adtally("--home", home, "query", "from fct_campaign_day order by all", "--format", "json")
    rows = json.loads(asked.out)
    assert [(row["event_date"], row["campaign_id"], row["spend_micros"]) for row in rows] == [
        ("2026-03-10", "c1", 3),
        ("2026-03-10", "c9", 0),
        ("2026-03-11", "c1", 0),
    ]


def test_marts_build_without_tables(adtally: Adtally) -> None:
    done = adtally("marts", "build")
    assert (done.status, done.out) == (1, "")
    assert "no marts without the Delta tables batch_ledger" in done.error and "run `adtally ingest` first" in done.error


def test_query_before_the_marts_are_built(adtally: Adtally, tmp_path: Path) -> None:
    done = adtally("query", "select 1")
    assert (done.status, done.out) == (1, "")
    path = tmp_path / ".adtally" / "marts" / "marts.duckdb"
    assert done.error == f"there are no marts yet at {path} (run `adtally marts build` first)"
    assert not (tmp_path / ".adtally").exists()  # a question leaves nothing behind


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("select nothing from fct", "nothing"),
        ("selec 1", "syntax error"),
        ("from no_such_mart", "no_such_mart"),
        ("", "one SQL statement, not 0"),
        ("drop table fct", "read-only"),
        ("select 1 as a, 2 as a", "two columns have one name"),
    ],
)
def test_wrong_sql(adtally: Adtally, marts: Path, sql: str, message: str) -> None:
    done = adtally("--home", marts, "query", sql, "--format", "json")
    assert (done.status, done.out) == (2, "")
    assert message in done.err and done.err.startswith("adtally: error: ") and "Traceback" not in done.err


def test_a_wrong_statement_is_shown_with_a_caret_below_the_fault(adtally: Adtally, marts: Path) -> None:
    done = adtally("--home", marts, "query", "select n,\n  nothing\nfrom fct")
    error, line, caret = done.err.splitlines()
    assert error.startswith("adtally: error: SQL: Binder Error: ") and done.status == 2
    assert line[caret.index("^") :] == "nothing"


def test_our_tables_are_suggested_not_those_of_the_catalogue(adtally: Adtally, marts: Path) -> None:
    done = adtally("--home", marts, "query", "select * from fctt")
    error, line, caret = done.err.splitlines()
    assert error == "adtally: error: SQL: Catalog Error: Table with name fctt does not exist! (did you mean fct?)"
    assert line[caret.index("^") :] == "fctt"
    error = adtally("--home", marts, "query", "from pg_enumm").err.splitlines()[0]
    assert error.endswith("does not exist! (`adtally query 'show tables'` lists the tables)")


def test_a_table_has_100_rows_unless_more_are_asked_for(adtally: Adtally, marts: Path) -> None:
    def rows(*options: str) -> tuple[int, str]:
        done = adtally("--home", marts, "query", "from fct order by n", *options)
        assert done.status == 0
        return len(done.out.splitlines()), done.err

    assert rows() == (103, "100 of 50,000 rows: --limit 0 prints all, --format csv or parquet has all\n")
    assert rows("--limit", "7")[0] == 10
    assert rows("--limit", "0") == (50_003, "")
    assert rows("--format", "csv") == (50_001, "")
    assert rows("--format", "csv", "--limit", "2")[0] == 3
    assert adtally("--home", marts, "query", "from range(100)").err == ""


def test_json_is_asked_for_in_one_way(adtally: Adtally, marts: Path) -> None:
    assert adtally("--home", marts, "query", "select 1 as n", "--json", "--no-build").out == '[\n  {"n": 1}\n]\n'


def test_query_writes_parquet(marts: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert app.run(["--home", str(marts), "query", VALUES, "--format", "parquet", "--no-build"]) == 0
    found = pq.read_table(io.BytesIO(capfdbinary.readouterr().out)).to_pylist()
    assert found == [
        {
            "gap": None,
            "price": Decimal("1.10"),
            "n": 9007199254740993,
            "big": 3,
            "at": datetime(2026, 3, 10, 10, 0, 0, 1),
            "zoned": datetime(2026, 3, 10, 8, tzinfo=UTC),
            "day": date(2026, 3, 10),
            "name": 'a, "b"',
            "yes": True,
            "list": [1, None],
        }
    ]
    huge = "select 170141183460469231731::hugeint as n union all select null order by 1 nulls last"
    assert app.run(["--home", str(marts), "query", huge, "--format", "parquet", "--no-build"]) == 0
    found = pq.read_table(io.BytesIO(capfdbinary.readouterr().out)).to_pylist()
    assert found == [{"n": Decimal(170141183460469231731)}, {"n": None}]


def test_a_narrow_terminal_gets_a_block_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    columns, rows = ["campaign_id", "impressions", "ctr"], [("c00001", 1234567, 0.021634615384615384), ("c00002", 7, None)]
    assert render(columns, rows, width=80).splitlines()[2].split() == ["c00001", "1234567", "0.021635"]
    assert render(columns, rows, width=33).splitlines() == [
        *("row 1", "  campaign_id c00001", "  impressions 1234567", "  ctr 0.021635"),
        *("row 2", "  campaign_id c00002", "  impressions 7   ctr NULL", "(2 rows)"),
    ]


def test_a_mistyped_home_is_not_made(adtally: Adtally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = adtally("--home", "tyop", "ingest")
    assert (done.status, done.error) == (2, f"there is no home at {tmp_path / 'tyop'} (mistyped? mkdir makes a new one)")
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "tyop"))
    assert adtally("ingest").status == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_short_too(adtally: Adtally, option: str) -> None:
    for command in ((), ("query",), ("marts", "build")):
        assert "Usage: adtally" in adtally(*command, option).out


def test_the_version_is_an_option_too(adtally: Adtally) -> None:
    assert adtally("--version").out == f"adtally {version('adtally')}\n"


VALUES = """
    select null as gap, 1.10::decimal(18, 2) as price, 9007199254740993::bigint as n, sum(range)::hugeint as big,
        timestamp '2026-03-10 10:00:00.000001' as at, timestamptz '2026-03-10 10:00:00+02' as zoned, date '2026-03-10' as day,
        'a, "b"' as name, true as yes, [1, null] as list
    from range(3)
"""


def test_query_prints_json_without_loss(adtally: Adtally, marts: Path) -> None:
    done = adtally("--home", marts, "query", VALUES, "--format", "json")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == [
        {
            "gap": None,
            "price": "1.10",
            "n": 9007199254740993,
            "big": 3,
            "at": "2026-03-10T10:00:00.000001",
            "zoned": "2026-03-10T08:00:00+00:00",
            "day": "2026-03-10",
            "name": 'a, "b"',
            "yes": True,
            "list": [1, None],
            "mart_build": "b1 b2",
        }
    ]
    # two groups of one build name it once; without a row there is nothing to name it of
    with duckdb.connect(str(marts / "marts" / "marts.duckdb")) as connection:
        connection.execute("update mart_build set build_id = 'b3'")
    asked = adtally("--home", marts, "query", "select 1 as one", "--format", "json").out
    assert json.loads(asked) == [{"one": 1, "mart_build": "b3"}]


def test_query_prints_csv(adtally: Adtally, marts: Path) -> None:
    assert adtally("--home", marts, "query", VALUES, "--format", "csv").out.splitlines() == [
        "gap,price,n,big,at,zoned,day,name,yes,list,mart_build",
        ',1.10,9007199254740993,3,2026-03-10T10:00:00.000001,2026-03-10T08:00:00+00:00,2026-03-10,"a, ""b""",true,"[1, null]"'
        ",b1 b2",
    ]
    assert adtally("--home", marts, "query", "select n from fct where false", "--format", "csv", "--no-build").out == "n\n"


def test_query_prints_a_table(adtally: Adtally, marts: Path) -> None:
    header, rule, row, count = adtally("--home", marts, "query", VALUES).out.splitlines()
    cells = row.split("  ")
    assert header.split() == ["gap", "price", "n", "big", "at", "zoned", "day", "name", "yes", "list"]
    assert [cell.strip() for cell in cells if cell.strip()] == [
        "NULL",
        "1.10",
        "9007199254740993",
        "3",
        "2026-03-10T10:00:00.000001",
        "2026-03-10T08:00:00+00:00",
        "2026-03-10",
        'a, "b"',
        "true",
        "[1, null]",
    ]
    assert set(rule) == {"-", " "} and count == "(1 row)"
    assert row.index("1.10") + 4 == header.index("price") + 5  # numbers stand to the right


def test_query_from_standard_input(marts: Path) -> None:
    with terminal.spawn("--home", str(marts), "query", "-", "--format", "csv", cwd=marts) as process:
        out, err = process.communicate("select count(*) as rows\nfrom fct;\n", timeout=60)
    assert (process.returncode, out, err) == (0, "rows,mart_build\n50000,b1 b2\n", "")


def test_status_of_an_empty_home(adtally: Adtally, tmp_path: Path) -> None:
    done = adtally("status")
    assert (done.status, done.err) == (0, "")
    assert NOTHING_INGESTED in done.out
    done = adtally("status", "--json")
    assert done.status == 0
    assert json.loads(done.out) == {
        "sources": [],
        "tables": [],
        "quarantined_files": [],
        "conservation_holds": True,
        "problems": [NOTHING_INGESTED],
        "publications": [],
        "topics": [],
        "waiting": [],
        "ignored": [],
        "rejects": [],
    }
    assert list(tmp_path.iterdir()) == []


def test_status_where_the_books_do_not_balance(built: tuple[Path, Done], adtally: Adtally, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(built[0], home)
    shutil.rmtree(home / "lakehouse" / "events")
    done = adtally("--home", home, "status")
    assert (done.status, done.err) == (1, "")
    assert "table events is missing, but others hold rows" in done.out
    assert "DOES NOT HOLD" in done.out
    done = adtally("--home", home, "status", "--json")
    assert done.status == 1
    found = json.loads(done.out)
    assert found["conservation_holds"] is False and "table events is missing, but others hold rows" in found["problems"]
    rows = {table["name"]: table["rows"] for table in found["tables"]}
    assert {name: count for name, count in rows.items() if count} == {"batch_ledger": 5, "minute_metrics": 4, "campaigns": 1}


def test_status_prints_times_and_lags(adtally: Adtally, monkeypatch: pytest.MonkeyPatch) -> None:
    at = datetime(2026, 3, 10, 12, 0, 5, tzinfo=UTC)
    source = status_module.SourceStatus("events", "files", "eu-west", 1234567, 1234567, 0, 0, 0, 0, 3725.0, 9, at)
    table = status_module.TableStatus("events", 3, 1234567, 12, 1_500_000)
    lost = status_module.QuarantinedFile("eu/[x].jsonl.gz", ["truncated_gzip"], at)
    ahead = status_module.SourceStatus("events", "files", "us", 1, 1, 0, 0, 0, 0, 0.0, 9, at, 251_606_474_273.8)
    found = status_module.Status([source, ahead], [table], [lost], True, ["[red]as it is[/]"])
    monkeypatch.setattr(status_module, "read_status", lambda _settings: found)
    out = adtally("status").out
    for part in (
        "1,234,567",
        "1 h 2 min",
        "0.0 s (clock ahead by 7,978 y 141 d)",
        "2026-03-10 12:00:05",
        "1.5 MB",
        "eu/[x].jsonl.gz",
        "truncated_gzip",
        "[red]as it is[/]",
    ):
        assert part in out
    assert json.loads(adtally("status", "--json").out)["sources"][0]["last_ingested_at"] == "2026-03-10T12:00:05+00:00"


# demo, bench, version


@pytest.mark.parametrize(("equal", "status"), [(True, 0), (False, 1)])
def test_demo_ends_with_1_where_a_figure_differs(
    adtally: Adtally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: bool, status: int
) -> None:
    seen: list[Any] = []

    def show_demo(home: Path | None, *, events: int, seed: int, console: Any, lakehouse: str | None = None) -> bool:
        seen.append((home, events, seed, lakehouse))
        return equal

    monkeypatch.setattr(demo_report, "show_demo", show_demo)
    assert adtally("--home", "d", "demo", "--events", "9", "--seed", "4", "--lakehouse", "s3://b/l").status == status
    assert seen == [(Path("d"), 9, 4, "s3://b/l")]


def test_bench_is_the_benchmark_of_the_checkout(tmp_path: Path) -> None:
    done = terminal.run("bench", "ingest", "--", "--help", cwd=tmp_path)
    assert done.status == 0
    assert done.out.startswith("usage: benchmarks.run ingest") and "--scenario" in done.out
    assert terminal.run("bench", "ingest", "--scenario", "none", cwd=tmp_path).status == 2


def test_version(adtally: Adtally) -> None:
    found = json.loads(adtally("version", "--json").out)
    assert found["adtally"] == version("adtally") and found["python"] == sys.version.split()[0]
    assert adtally("version").out.splitlines() == [f"{name} {number}" for name, number in found.items()]


# doctor


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has all: jars as the lock wants them would be 25 MB, so an empty lock of this cache will do."""
    empty = jars.JarLock("x", (), (jars.LockedJar("a.jar", 0, jars.sha256_of(Path("/dev/null"))),), {})
    monkeypatch.setattr(jars, "read_lock", lambda: empty)
    monkeypatch.setenv("ADTALLY_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "jars" / empty.digest
    folder.mkdir(parents=True)
    (folder / "a.jar").touch()
    script = tmp_path / "jdk" / "bin" / "java"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\necho 'openjdk version \"17.0.1\"' >&2\n")
    script.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    java.require_java.cache_clear()


@pytest.fixture(autouse=True)
def _java_is_looked_for_anew() -> Iterator[None]:
    yield
    java.require_java.cache_clear()


def checks(done: Done) -> dict[str, tuple[bool, str]]:
    """Name -> (ok, detail); holds the verdict to the checks."""
    found = json.loads(done.out)
    assert found["ok"] == all(check["ok"] for check in found["checks"]) == (done.status == 0)
    assert done.status in (0, 2)
    return {check["name"]: (check["ok"], check["detail"]) for check in found["checks"]}


NAMES = [
    *("settings", "python", "java", "jars", "duckdb extension", "home", "lakehouse", "spark"),
    *("locale", "ports", "landing", "disk", "fsync"),
]


@pytest.mark.usefixtures("healthy")
def test_doctor_on_a_healthy_machine(adtally: Adtally, tmp_path: Path) -> None:
    found = checks(adtally("doctor", "--json"))
    assert list(found) == NAMES and all(ok for ok, _ in found.values())
    assert found["java"][1] == f"Java 17 at {tmp_path / 'jdk' / 'bin' / 'java'}"
    assert found["home"][1] == f"{tmp_path / '.adtally'} will be made"
    assert not (tmp_path / ".adtally").exists()
    plain = adtally("doctor")
    assert (plain.status, plain.err) == (0, "")
    assert [line.split(":")[0] for line in plain.out.splitlines()] == [f"ok      {name}" for name in NAMES]


@pytest.mark.usefixtures("healthy")
def test_doctor_tells_every_fault(adtally: Adtally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("ADTALLY_CACHE_DIR", str(tmp_path / "other-cache"))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "no-jdk"))
    monkeypatch.setitem(sys.modules, "duckdb_extension_delta", None)
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 10**18)
    done = adtally("doctor", "--json")
    found = checks(done)
    assert done.status == 2
    assert [name for name in NAMES if not found[name][0]] == ["java", "jars", "duckdb extension", "home", "disk"]
    assert java.INSTALL_JAVA in found["java"][1]
    assert "`adtally doctor --fix`" in found["jars"][1]
    assert "duckdb-extension-delta" in found["duckdb extension"][1]
    assert "is not a folder" in found["home"][1]
    assert not (tmp_path / "other-cache").exists()  # without --fix nothing is got
    plain = adtally("doctor")
    assert plain.status == 2
    assert [line for line in plain.out.splitlines() if line.startswith("missing java: ")]


@pytest.mark.usefixtures("healthy")
def test_doctor_says_what_is_in_the_way_of_an_ingest(adtally: Adtally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_HOME", str(tmp_path / "another"))
    monkeypatch.setenv("PYSPARK_PYTHON", "/usr/bin/python2")
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "my ads"))
    monkeypatch.setattr(doctor, "_SLOW_SYNC_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("ADTALLY_WEBSERVER_PORT", str(server.getsockname()[1]))
        found = checks(adtally("doctor", "--json"))
    assert found["spark"][0] and found["spark"][1].endswith(
        f"are not used: SPARK_HOME={tmp_path / 'another'}, PYSPARK_PYTHON=/usr/bin/python2"
    )
    assert found["ports"][0] and "`adtally up --port 0` takes a free one" in found["ports"][1]
    assert found["fsync"][0] and "slow: a batch waits" in found["fsync"][1]
    assert found["home"] == (True, f"{tmp_path / 'my ads'} will be made")
    monkeypatch.setenv("ADTALLY_SPARK_MASTER", "spark://127.0.0.1:7077")
    assert checks(adtally("doctor", "--json"))["spark"] == (
        False,
        f"SPARK_HOME is {tmp_path / 'another'}, which is no folder (unset SPARK_HOME, or point it to Spark {version('pyspark')})",
    )
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "a[1]"))
    settings = checks(adtally("doctor", "--json"))["settings"]
    assert settings[0] is False and "has the character '['" in settings[1]
    assert not (tmp_path / "my ads").exists() and not (tmp_path / "a[1]").exists()


@pytest.mark.usefixtures("healthy")
def test_doctor_with_wrong_settings(adtally: Adtally, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADTALLY_DRIVER_MEMORY", "lots")
    found = checks(adtally("doctor", "--json"))
    assert found["settings"][0] is False and "ADTALLY_DRIVER_MEMORY" in found["settings"][1]
    assert found["java"][0] is True


@pytest.mark.usefixtures("healthy")
def test_doctor_fixes_the_jars(adtally: Adtally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADTALLY_CACHE_DIR", str(tmp_path / "other-cache"))
    jar = tmp_path / "a.jar"
    jar.touch()
    monkeypatch.setattr(jars, "_resolve", lambda *_: [jar])
    done = adtally("doctor", "--fix", "--json")
    assert checks(done)["jars"][0] is True
    assert "resolving 1 jars" in done.err  # not among the JSON
    monkeypatch.setattr(jars, "_resolve", _raises(MachineError("the jars could not be resolved", hint="run again")))
    monkeypatch.setenv("ADTALLY_CACHE_DIR", str(tmp_path / "third-cache"))
    assert checks(adtally("doctor", "--fix", "--json"))["jars"] == (False, "the jars could not be resolved (run again)")


def test_doctor_holds_the_cache_to_the_lock(adtally: Adtally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = json.loads(LOCK_FILE.read_text("utf-8"))
    folder = tmp_path / "cache" / "jars" / jars.read_lock().digest
    folder.mkdir(parents=True)
    for entry in lock["jars"]:
        with (folder / entry["name"]).open("wb") as file:
            file.truncate(entry["size"])  # the right size, and nothing but zeros
    monkeypatch.setenv("ADTALLY_CACHE_DIR", str(tmp_path / "cache"))
    ok, detail = checks(adtally("doctor", "--json"))["jars"]
    assert not ok and "SHA-256" in detail and "no jar was used" in detail


# Signals and pipes, which need a process


def test_ctrl_c_is_exit_status_130(marts: Path) -> None:
    with terminal.spawn("--home", str(marts), "query", "-", cwd=marts) as process:
        assert process.stdin is not None
        # more than a pipe holds: when all of it is written, the command reads, and goes on reading
        process.stdin.write(" " * 500_000)
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "adtally: error: interrupted\n")


@pytest.mark.parametrize("sql", ["from fct", "select 1"])
def test_a_reader_that_has_seen_enough_is_no_error(marts: Path, sql: str) -> None:
    with terminal.spawn("--home", str(marts), "query", sql, "--limit", "0", cwd=marts) as process:
        assert process.stdout is not None and process.stderr is not None
        if sql == "from fct":
            assert process.stdout.readline().strip() == "n"
        process.stdout.close()
        err = process.stderr.read()
        assert (process.wait(60), err) == (0, "")


@pytest.mark.parametrize("sql", ["from fct", "select 1"], ids=["while it is written", "at the end"])
def test_an_output_that_is_full_is_an_error(marts: Path, sql: str) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with full.open("w") as output:
        process = terminal.spawn("--home", str(marts), "query", sql, "--limit", "0", cwd=marts, stdout=output)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert Done(1, "", err).error.startswith("OSError: [Errno 28]")


def test_no_trace_reaches_the_terminal(tmp_path: Path) -> None:
    env = environment(ADTALLY_SHUFFLE_PARTITIONS="many")
    done = terminal.run("status", cwd=tmp_path, env=env)
    assert (done.status, done.out) == (2, "")
    assert done.error.startswith("wrong settings: ADTALLY_SHUFFLE_PARTITIONS: ")
    with_trace = terminal.run("--debug", "status", cwd=tmp_path, env=env)
    assert with_trace.status == 2 and with_trace.err.startswith("Traceback (most recent call last):")
