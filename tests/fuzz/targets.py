"""What is fuzzed: for each target, what must hold of any bytes. A folder tests/cases/fuzz/<target>/ has the inputs to start from.

Where several readers of one input exist, they must agree. Where one exists, it refuses what is wrong with one clear error of ours,
and what it takes can be written and read again.
"""

from __future__ import annotations

import csv
import io
import json
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pytest

from orchestration.compare.report import read_report
from orchestration.marts import query_marts
from spark_jobs.attribution.rules import AttributionRules
from spark_jobs.audit.statement import compare_statement
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, TableCorruptionError, UsageError
from spark_jobs.ingest.campaigns import read_campaigns
from spark_jobs.ingest.contract import alike
from spark_jobs.ingest.kafka.config import read_kafka
from spark_jobs.lake.log import DeltaLog
from spark_jobs.rules.store import canonical, read_rules
from spark_jobs.traffic.rules import RuleFile
from tests.spark_jobs.audit import test_decode as auditor
from tests.spark_jobs.audit import test_files as auditor_files
from tests.spark_jobs.ingest.contract import test_agreement as ingest
from tests.spark_jobs.ingest.contract.cases import base

CORPUS = Path(__file__).resolve().parents[1] / "cases" / "fuzz"

Check = Callable[[bytes, Path], None]
"""Checks what must hold of some bytes; the folder is empty, or as the last check of the target left it."""


@dataclass(frozen=True)
class Target:
    """One reader of bytes. ``tokens`` are inserted by the fuzzer; they mean something to the reader."""

    name: str
    check: Check
    tokens: tuple[bytes, ...] = ()

    @property
    def corpus(self) -> list[Path]:
        """The files to start from."""
        return sorted(path for path in (CORPUS / self.name).iterdir() if path.is_file())


# --- records

_JSON = (
    b"null",
    b"true",
    b"1.0",
    b"1e3",
    b"-0",
    b'""',
    b"{}",
    b"[]",
    b"\\u0000",
    b"\\ud83d",
    b'"x":1,',
    b"\n",
    b"\r",
    b"\xff",
    b"9" * 30,
)
_TIMES = (b"2025-06-02T10:00:00Z", b"+23:59", b"0000-01-01T00:00:00Z", b"9999-12-31T23:59:59.9999999Z", b"24:00:00", b"60Z")


def check_lines(stream: str, data: bytes) -> None:
    """The exact validator, the fast one, the one for lines of one form, and the auditor give the same of every line."""
    raws = data.split(b"\n")[:40]
    is_terminated = not raws[-1] and len(raws) > 1
    raws = raws[:-1] if is_terminated else raws
    if not data:
        return
    ingest.assert_agreement(stream, ingest.chunk_of(raws, terminated=is_terminated or not raws[-1]))
    auditor.assert_agreement(stream, raws, terminated=is_terminated or not raws[-1])
    auditor.assert_values_agree(stream, [*raws, None])
    usual = json.dumps(base(stream), separators=(",", ":"), ensure_ascii=False).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alike, "FEWEST_LINES", 1)
        ingest.assert_agreement(stream, ingest.chunk_of(ingest.among_others(raws[:4], usual)))


def check_gzip(data: bytes, folder: Path) -> None:
    """Ingest and auditor find the same lines in a file of gzip members, and the same fault at its end."""
    path = folder / "file.jsonl.gz"
    path.write_bytes(data)
    rows = auditor_files.parsed(path).to_pylist()
    found = [(row["line"], row["is_valid"], next((r for r in row["reasons"] or () if r.endswith("gzip")), None)) for row in rows]
    assert found == auditor_files.by_the_ingest(path, ingest.REGION)


# --- files of operators


@contextmanager
def refusal() -> Iterator[None]:
    """Accept one clear error of ours. Any other exception goes on."""
    try:
        yield
    except AdtallyError as error:
        text = str(error)
        assert text
        assert "Traceback" not in text
        assert len(text) < 20_000


def check_campaigns(data: bytes, folder: Path) -> None:
    """A price list that is taken can be written and read again, and is refused as a whole otherwise."""
    path = folder / "campaigns" / "campaigns.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with refusal():
        found = read_campaigns(folder)
        text = io.StringIO(newline="")
        names = ["campaign_id", "store_id", "billing_model", "daily_budget_micros", "currency", "valid_from", "valid_to"]
        writer = csv.writer(text)
        writer.writerow(names)
        for one in found:
            times = (None if us is None else _time(us) for us in (one.valid_from_us, one.valid_to_us))
            writer.writerow([one.campaign_id, one.store_id, one.billing_model, one.daily_budget_micros, one.currency, *times])
        path.write_text(text.getvalue(), "utf-8", newline="")
        assert read_campaigns(folder) == found


def _time(us: int) -> str:
    return datetime.fromtimestamp(us // 10**6, UTC).replace(microsecond=us % 10**6).isoformat()


SECRET = "hunter2-of-the-corpus"


def check_kafka(data: bytes, folder: Path) -> None:
    """A kafka.toml is taken or refused by one line that never has a secret's value."""
    path = folder / "kafka.toml"
    path.write_bytes(data)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    try:
        found = read_kafka(load_settings(home=folder))
    except AdtallyError as error:
        assert SECRET not in str(error)
        assert "\n" not in str(error)
        return
    assert SECRET not in repr(found)


def check_rules(data: bytes, folder: Path) -> None:
    """A rule file is taken or refused, by both kinds of rules; what is taken is the same after its canonical form."""
    path = folder / "rules.toml"
    path.write_bytes(data)
    for model in (RuleFile, AttributionRules):
        with refusal():
            found = read_rules(path, model)
            assert model.model_validate(json.loads(found.model_dump_json())) == found
            assert canonical(found) == canonical(model.model_validate(json.loads(found.model_dump_json())))


def check_commit(data: bytes, folder: Path) -> None:
    """A commit of a table's log is read, or is a damage that is named."""
    log = folder / "table" / "_delta_log"
    log.mkdir(parents=True, exist_ok=True)
    (log / f"{0:020d}.json").write_bytes(data)
    found = DeltaLog(str(folder / "table"))
    try:
        commit = found.commit(0)
    except TableCorruptionError:
        assert found.faults()
        return
    assert commit is not None
    assert not found.faults()
    _ = commit.metadata, commit.committed_ms, commit.changes_rows, commit.added_paths, commit.removed_paths


@cache
def _marts(folder: Path) -> tuple[Settings, bytes]:
    made = load_settings(home=folder / "home", query_memory="200m", query_spill="50m", query_timeout=0.3)
    made.marts_path.parent.mkdir(parents=True)
    with duckdb.connect(str(made.marts_path)) as connection:
        connection.execute("create table fct as select 1::bigint as n, timestamp '2026-03-10 10:00:00' as at, null as gap")
    return made, made.marts_path.read_bytes()


def check_query(data: bytes, folder: Path) -> None:
    """A query reads, or is refused; it changes no file, makes none, and shows none of this machine's."""
    settings, content = _marts(folder)
    before = sorted(folder.rglob("*"))
    try:
        sql = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    with refusal():
        _, rows = query_marts(settings, sql)
        assert "root:x:0" not in str(rows)[:100_000]
    assert settings.marts_path.read_bytes() == content
    assert [path for path in sorted(folder.rglob("*")) if "scratch" not in path.parts] == [
        path for path in before if "scratch" not in path.parts
    ]


def check_compare(data: bytes, folder: Path) -> None:
    """A report is taken, and then has the counts that Python's reader finds, or is refused."""
    path = folder / "report.csv"
    path.write_bytes(data)
    with refusal():
        found = read_report(path)
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))
        named = [{(name or "").strip().lower(): value for name, value in row.items()} for row in rows]
        sums = [sum(int(row[name].strip()) for row in named if (row.get(name) or "").strip()) for name in ("impressions", "clicks")]
        assert [sum(line.impressions for line in found), sum(line.clicks for line in found)] == sums


POSTED: list[dict[str, Any]] = [
    {
        "line_id": f"l{n}",
        "event_date": datetime(2025, 6, 2, tzinfo=UTC).date(),
        "campaign_id": "c",
        "store_id": "s",
        "currency": "EUR",
    }
    | {"line_type": "charge", "reason": "day_closed", "run_id": "r", "amount_micros": 10_000 * n, "chain_position": n}
    for n in (1, 2, 3)
]


def check_statement(data: bytes, folder: Path) -> None:
    """A statement is compared, or refused; without a fault every amount in it is one that was posted."""
    path = folder / ("statement.json" if data[:1] in (b"[", b"{") else "statement.csv")
    path.write_bytes(data)
    try:
        count, faults = compare_statement(path, POSTED)
    except UsageError:
        return
    assert faults or count <= len(POSTED)


_SQL: tuple[bytes, ...] = (
    b"select",
    b"from fct",
    b" where ",
    b"read_text('/etc/passwd')",
    b"copy",
    b"attach",
    b"(",
    b")",
    b"union all",
    b"with recursive",
)
_SQL += (
    b"range(1000000000)",
    b"'",
    b"--",
    b"/*",
    b";",
    b"pragma ",
    b"explain ",
    b"getenv('HOME')",
    b"glob('/*')",
    b"import database",
)
_TOML = (b"[", b"]", b"[[", b"]]", b"=", b'"', b"'''", b"1e400", b"nan", b"inf", b"{", b"}", b"#", b"9" * 5000, b"1979-05-27")
_CSV = (b'"', b'""', b",", b"\r\n", b"\n", b"\x00", b"\xef\xbb\xbf", b";", b"-1", b"1e3", b" ", b"=")
_DELTA = (
    b'"add"',
    b'"txn"',
    b'"remove"',
    b'"commitInfo"',
    b'"metaData"',
    b"null",
    b"5",
    b"{}",
    b"[]",
    b'"userMetadata"',
    b"\n",
    b'"path"',
)

TARGETS = {
    target.name: target
    for target in (
        Target("event-lines", lambda data, _: check_lines("events", data), (*_JSON, *_TIMES)),
        Target("order-lines", lambda data, _: check_lines("orders", data), (*_JSON, *_TIMES)),
        Target("gzip-members", check_gzip, (b"\x1f\x8b\x08\x00", b"\x00" * 9, b"\xff\xff")),
        Target("campaign-csv", check_campaigns, (*_CSV, *_TIMES)),
        Target("kafka-toml", check_kafka, (*_TOML, b"password", b"env", b"file", b"options")),
        Target("rules-toml", check_rules, _TOML),
        Target("delta-commit", check_commit, (*_DELTA, *_JSON)),
        Target("query-sql", check_query, _SQL),
        Target("compare-csv", check_compare, _CSV),
        Target("statement", check_statement, (*_CSV, *_JSON)),
    )
}
