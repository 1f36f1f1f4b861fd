"""Erasure, end to end: one token replaces the id everywhere, and nothing that counts changes."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import correct
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killed import run_code
from lake import campaigns, event, land, lines, order
from sparkless import Checkpoint, ingest
from sparkless import run as run_batch

from spark_jobs.attribution.job import attribute
from spark_jobs.audit.verify import verify
from spark_jobs.billing.job import bill
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.erasure.job import Receipt, erase, preview, prove, queue_erasure, queued_erasures, unproven_runs
from spark_jobs.erasure.suppression import read_suppression
from spark_jobs.erasure.tables import PERSONAL
from spark_jobs.errors import AdtallyError, ConfigurationError, TableCorruptionError, UsageError
from spark_jobs.lake.acts import read_audit_log
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import HOUR_CLOSINGS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.watermark import close_by_hand
from spark_jobs.steps import CRASH_VARIABLE, Step

ANNA, BERT, CARA = "user-anna-0001", "ünï-bert@example.org", "user-cara-0003"
NOW = datetime(2025, 6, 10, tzinfo=UTC)
TABLES = ("events", "rejected_events", "orders", "rejected_orders", "attributed_orders")
"""The tables of the home that have people."""


def _count(settings: Settings, needle: str) -> int:
    return len(correct.rows(settings, f"select event_id from events where user_id = '{needle}'"))


def make_home(home: Path) -> Settings:
    """A home in which Anna, Bert and Cara have events and orders, resends, conflicts, rejects and broken lines."""
    settings = load_settings(home=home)
    ensure_tables(settings)
    campaigns(settings)
    first = [event(f"e-{n}", user_id=(ANNA, BERT, CARA)[n % 3], event_type="click" if n % 2 else "impression") for n in range(12)]
    land(settings, "events/eu/a.jsonl", lines(first))
    land(
        settings,
        "events/eu/b.jsonl.gz",
        gzip.compress(
            lines([*first[:3], event("e-1", user_id=BERT, price_micros=9), event("e-0", user_id=CARA)])
            + json.dumps(event("e-20", user_id=ANNA)).replace("anna", "\\u0061nna").encode()
            + b"\n"
            + lines([event("e-21", user_id=ANNA, currency="XXX"), event("e-22", user_id=CARA, note=f"was {ANNA} before")])
            + f'{{"event_id": "broken", "user_id": "{ANNA}"\n'.encode()
            + b"\xff\xfe "
            + ANNA.encode()
            + b" \n"
        ),
    )
    placed = [order(f"o-{n}", user_id=(ANNA, BERT, CARA)[n % 3]) for n in range(6)]
    land(settings, "orders/eu/a.jsonl", lines([*placed, order("o-0", user_id=ANNA, total_micros=1), placed[1]]))
    land(
        settings,
        "orders/eu/b.jsonl",
        lines([order("o-3", user_id=ANNA, status="cancelled"), order("o-9", user_id=ANNA, status="x")]),
    )
    for stream in ("events", "orders"):
        ingest(settings, stream, files_per_batch=1)
    attribute(settings)
    return settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The home, made once."""
    return make_home(tmp_path_factory.mktemp("made") / "home")


@pytest.fixture
def home(made: Settings) -> Iterator[Settings]:
    """The home to work on, put back afterwards: its checkpoints name paths."""
    kept = made.home_path.with_name("kept")
    if not kept.exists():
        shutil.copytree(made.home_path, kept)
    yield made
    shutil.rmtree(made.home_path)
    shutil.copytree(kept, made.home_path)


def erased(settings: Settings, *ids: str) -> Receipt:
    """Erase people, and prove it."""
    (run,) = erase(settings, ids, now=NOW)
    return prove(settings, run, now=NOW)


def told_apart(settings: Settings) -> dict[str, Any]:
    """All that counts: the tables without people, and their rows without what names people."""
    names = "user_id, fingerprint, source_line, source_file, _run_id, _query_id, ingested_at"
    held = correct.contents(settings)
    return {
        **{name: held[name] for name in ("minute_metrics", "batch_ledger", "record_uuids_twice")},
        "events": correct.rows(settings, f"select * exclude ({names}) from events"),
        "orders": correct.rows(settings, f"select * exclude ({names}) from orders"),
        "credits": correct.rows(settings, "select * exclude (user_id) from attributed_orders"),
        "rejected": correct.rows(
            settings, "select outcome, reason_codes, source_file, source_line, record_id from rejected_events"
        ),
        "events a person": correct.rows(settings, "select count(*) from events group by user_id"),
    }


def test_erased_everywhere_and_nothing_that_counts_changes(home: Settings) -> None:
    bill(home)
    before = told_apart(home)
    receipt = erased(home, ANNA, BERT)
    assert receipt.totals_equal
    assert receipt.files_rewritten == 4
    assert told_apart(home) == before
    # beside the proof, by hands of our own
    for path in home.home_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            data += gzip.decompress(data) if path.suffix == ".gz" else b""
            assert ANNA.encode() not in data, path
            assert BERT.encode() not in data, path
    for table in ("events", "orders", "attributed_orders", "rejected_events", "rejected_orders"):
        texts = repr(correct.select(home, f"select * from {table}").to_pylist())
        assert ANNA not in texts
        assert BERT not in texts
    assert reconcile(home, None).differences == []
    # nothing is left to do: not for the ingest, not for attribution, not for another erasure
    assert erase(home, now=NOW) == []
    assert attribute(home).revisions == 0
    assert ingest(home, "events") == []
    again = erased(home, ANNA)
    assert (again.files_rewritten, again.rows_rewritten, again.old_files_deleted) == (0, {}, 0)
    assert told_apart(home) == before


def test_what_an_operator_wrote_is_linked_anew_and_the_audit_log_has_the_act(home: Settings) -> None:
    for hour, reason in enumerate(("a quiet night", f"{ANNA} complained", "all is here")):
        close_by_hand(home, NOW - timedelta(days=4 - hour), reason=reason, closed_by="me", now=NOW)
    assert verify(home, now=NOW, recounts=False).findings == []
    receipt = erased(home, ANNA)
    closings = correct.select(home, "select reason, row_hash from hour_closings order by chain_position").to_pylist()
    assert [row["reason"] for row in closings] == ["a quiet night", f"{_token(home)} complained", "all is here"]
    assert verify(home, now=NOW, recounts=False).findings == []
    found = [entry for entry in read_audit_log(home) if entry.act == "erase"]
    assert [(entry.run_id, json.loads(entry.arguments)["people"]) for entry in found] == [(receipt.erasure_id, 1)]
    assert ANNA not in repr(found)


def test_closings_of_an_older_adtally_are_rewritten_without_a_chain(home: Settings) -> None:
    close_by_hand(home, NOW - timedelta(days=4), reason=f"{ANNA} complained", closed_by="me", now=NOW)
    rows = correct.select(
        home, "select * replace (null as chain_position, null as previous_hash, null as row_hash) from hour_closings"
    )
    Lake(home).replace(HOUR_CLOSINGS, rows.cast(HOUR_CLOSINGS.schema), Step.HOUR_CLOSINGS)
    erased(home, ANNA)
    assert correct.rows(home, "select reason, row_hash from hour_closings") == [(f"{_token(home)} complained", None)]


def test_a_broken_chain_is_not_given_new_hashes(home: Settings) -> None:
    close_by_hand(home, NOW - timedelta(days=4), reason=f"{ANNA} complained", closed_by="me", now=NOW)
    rows = correct.select(home, "select * from hour_closings")
    changed = rows.set_column(rows.schema.get_field_index("closed_by"), "closed_by", pa.array(["somebody else"]))
    Lake(home).replace(HOUR_CLOSINGS, changed.cast(HOUR_CLOSINGS.schema), Step.HOUR_CLOSINGS)
    with pytest.raises(TableCorruptionError, match="the hash chain of table hour_closings is broken"):
        erased(home, ANNA)


@pytest.mark.homes
def test_a_receipt_names_nobody(home: Settings) -> None:
    receipt = erased(home, ANNA)
    (kept,) = (path for path in home.home_path.rglob("receipts/*.json"))
    assert ANNA not in kept.read_text()
    assert json.loads(kept.read_text())["people"] == receipt.people
    found = correct.select(home, "select person, detail, requested_at from erasures where kind = 'receipt'").to_pylist()
    assert [row["person"] for row in found] == receipt.people
    assert json.loads(found[0]["detail"])["totals"] == receipt.totals
    assert [path.stat().st_mode & 0o777 for path in home.home_path.rglob("_adtally/erasure/key")] == [0o600]
    assert [path.stat().st_mode & 0o777 for path in home.home_path.rglob("suppressed.json")] == [0o600]
    assert not list(home.home_path.rglob("_adtally/erasure/runs/*"))


def test_a_resend_is_a_duplicate_a_changed_one_a_conflict(home: Settings) -> None:
    token = erased(home, ANNA) and _token(home)
    land(
        home,
        "events/eu/c.jsonl",
        [event("e-0", user_id=ANNA), event("e-3", user_id=ANNA, price_micros=7), event("e-30", user_id=ANNA)],
    )
    land(
        home, "events/eu/d.jsonl", lines([event("e-31", user_id=ANNA, currency="XXX")]) + b'{"user_id": "' + ANNA.encode() + b'",\n'
    )
    land(
        home,
        "orders/eu/c.jsonl",
        [order("o-6", user_id=ANNA), order("o-0", user_id=ANNA), order("o-3", user_id=ANNA, total_micros=7)],
    )
    (events,) = ingest(home, "events")
    (orders,) = ingest(home, "orders")
    assert (events.accepted, events.duplicate, events.conflict, events.rejected) == (1, 1, 1, 2)
    assert (orders.accepted, orders.duplicate, orders.conflict) == (1, 1, 1)
    attribute(home)
    assert _count(home, ANNA) == 0
    texts = "".join(repr(correct.select(home, f"from {name}").to_pylist()) for name in TABLES)
    assert ANNA not in texts
    assert (("e-30", token),) == tuple(correct.rows(home, "select event_id, user_id from events where event_id = 'e-30'"))
    assert reconcile(home, None).differences == []
    # the files that came with the id are rewritten by the next erasure
    erased(home, CARA)
    assert ANNA.encode() not in (home.landing_path / "events/eu/c.jsonl").read_bytes()
    assert ANNA.encode() not in (home.landing_path / "events/eu/d.jsonl").read_bytes()
    assert reconcile(home, None).differences == []


def test_without_the_list_the_id_would_come_back(home: Settings) -> None:
    erased(home, ANNA)
    land(home, "events/eu/c.jsonl", [event("e-0", user_id=ANNA)])
    for path in home.home_path.rglob("suppressed.json"):
        path.unlink()
    (report,) = ingest(home, "events")
    assert (report.duplicate, report.conflict) == (0, 1)


@pytest.mark.homes
def test_a_lost_checkpoint_replays_to_the_same_rows(home: Settings) -> None:
    erased(home, ANNA, BERT)
    before = told_apart(home)["events"]
    shutil.rmtree(home.checkpoints_path)
    shutil.rmtree(home.key_index_path, ignore_errors=True)
    (report,) = ingest(home, "events")
    assert (report.accepted, report.conflict) == (0, 2)
    assert told_apart(home)["events"] == before


@pytest.mark.homes
def test_a_repair_finds_the_raw_input_under_the_token(home: Settings) -> None:
    erased(home, ANNA)
    truth = correct.contents(home, identity=False)
    correct.delete(home, "events", "event_id in ('e-0', 'e-1')")
    correct.delete(home, "rejected_events", "true")
    reconcile(home, None, repair=True)
    assert correct.contents(home, identity=False)["events"] == truth["events"]
    assert reconcile(home, None).differences == []
    assert ANNA not in repr(correct.select(home, "from rejected_events").to_pylist())


PLANTED = {
    "text": lambda: ANNA.encode(),
    "json escapes": lambda: json.dumps({"x": ANNA}).replace("user", "\\u0075ser").encode(),
    "escaped": lambda: "".join(f"\\u{ord(one):04x}" for one in ANNA).encode(),
    "base64": lambda: base64.b64encode(ANNA.encode()),
    "hex": lambda: ANNA.encode().hex().encode(),
    "url": lambda: b"?u=" + "".join(f"%{byte:02X}" for byte in ANNA.encode()).encode(),
    "gzip": lambda: gzip.compress(b"some " + ANNA.encode()),
    "utf-8": lambda: BERT.encode(),
    "url of utf-8": lambda: quote(BERT, safe="").encode(),
}


@pytest.mark.parametrize("form", [pytest.param(one, marks=() if one == "text" else pytest.mark.homes) for one in PLANTED])
def test_a_planted_copy_makes_the_proof_fail(home: Settings, form: str) -> None:
    (run,) = erase(home, [ANNA, BERT], now=NOW)
    planted = home.home_path / "kept" / ("copy.gz" if form == "gzip" else "copy.bin")
    planted.parent.mkdir()
    planted.write_bytes(PLANTED[form]())
    with pytest.raises(AdtallyError, match=r"an id is still in .*copy"):
        prove(home, run, now=NOW)
    planted.unlink()
    prove(home, run, now=NOW)


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2], "names": [["x"], [ANNA]]}), path, compression="zstd")


def _arrow(path: Path) -> None:
    rows = pa.table({"raw": ["x", f'{{"user_id": "{ANNA}"}}']})
    with pa.ipc.new_file(str(path), rows.schema) as sink:
        sink.write_table(rows)


def _duckdb(path: Path) -> None:
    with duckdb.connect(str(path)) as made:
        made.execute(f"create schema other; create table other.t as select '{ANNA}' as source from range(3000)")


def _sqlite(path: Path) -> None:
    with closing(sqlite3.connect(path)) as made:
        made.execute("create table t (a text)")
        made.execute("insert into t values (?)", (f"seen: {ANNA}!",))
        made.commit()


@pytest.mark.homes
@pytest.mark.parametrize("write", [_parquet, _arrow, _duckdb, _sqlite])
def test_the_proof_reads_what_is_packed(home: Settings, write: Callable[[Path], None]) -> None:
    (run,) = erase(home, [ANNA], now=NOW)
    write(home.home_path / "planted.duckdb")
    with pytest.raises(AdtallyError, match=r"an id is still in .*planted\.duckdb"):
        prove(home, run, now=NOW)


@pytest.mark.homes
def test_the_proof_reads_the_tables_and_the_input(home: Settings) -> None:
    (run,) = erase(home, [ANNA], now=NOW)
    table = home.home_path / "lakehouse" / "events"
    _parquet(table / "left.snappy.parquet")
    with pytest.raises(AdtallyError, match=r"left\.snappy\.parquet"):
        prove(home, run, now=NOW)
    (table / "left.snappy.parquet").unlink()
    with (home.landing_path / "events/eu/a.jsonl").open("ab") as file:
        file.write(lines([event("e-99", user_id=ANNA)]))
    with pytest.raises(AdtallyError, match=r"a\.jsonl"):
        prove(home, run, now=NOW)


def test_a_changed_total_makes_the_proof_fail(home: Settings) -> None:
    (run,) = erase(home, [ANNA], now=NOW)
    correct.update(home, "events", "event_id = 'e-2'", spend_nanos="spend_nanos + 1")
    with pytest.raises(AdtallyError, match="the erasure changed events"):
        prove(home, run, now=NOW)


STEPS = [
    ("after", Step.SUPPRESSED, 1),
    ("before", Step.ERASURE_DECIDED, 0),
    ("after", Step.ERASURE_DECIDED, 0),
    ("after", Step.SUPPRESSED, 0),
    *(("after", Step.ERASED_INPUT, number) for number in range(4)),
    ("after", Step.ERASURES, 0),
    *(("after", Step.ERASED_ROWS, number) for number, table in enumerate(PERSONAL) if table.name in TABLES),
    *(
        ("after", step, number)
        for step in (Step.ERASED_ROWS, Step.ERASED_COMMIT)
        for number, table in enumerate(PERSONAL)
        if table is HOUR_CLOSINGS
    ),
    *(("after", Step.ERASED_VERSIONS, number) for number, table in enumerate(PERSONAL) if table.name in TABLES),
    ("before", Step.ERASURE_CARRIED_OUT, 0),
    ("after", Step.ERASURE_CARRIED_OUT, 0),
    ("before", Step.ERASURES, 1),
    ("after", Step.ERASURES, 1),
    ("before", Step.ERASURE_DONE, 0),
    ("after", Step.ERASURE_DONE, 0),
]
QUICK = [STEPS[9]]
KILLED = (
    "from datetime import UTC, datetime; from spark_jobs.config import load_settings; "
    "from spark_jobs.erasure.job import erase, prove; "
    f"now = datetime(2025, 6, 10, tzinfo=UTC); settings = load_settings(); runs = erase(settings, ['{ANNA}', '{BERT}'], now=now); "
    "[prove(settings, run, now=now) for run in runs]"
)


@pytest.mark.parametrize(
    ("moment", "step", "number"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.crash) for one in STEPS]
)
def test_killed_at_every_step(home: Settings, moment: str, step: Step, number: int) -> None:
    close_by_hand(home, NOW - timedelta(days=4), reason=f"{ANNA} complained", closed_by="me", now=NOW)
    before = told_apart(home)
    at = {CRASH_VARIABLE: f"{moment}:{step}:{number}"}
    assert run_code(KILLED, ADTALLY_HOME=str(home.home_path), **at) == -signal.SIGKILL
    # whatever corrects tables next finishes it
    assert reconcile(home, None).differences == []
    assert told_apart(home) == before
    left = unproven_runs(home)
    if left:
        assert _count(home, ANNA) == 0
        prove(home, left[0], now=NOW)
    elif _count(home, ANNA):
        assert (moment, step) in (("after", Step.SUPPRESSED), ("before", Step.ERASURE_DECIDED))
        erased(home, ANNA, BERT)
    assert not unproven_runs(home)
    receipts = correct.rows(home, "select person, count(*) from erasures where kind = 'receipt' group by person")
    assert [count for _, count in receipts] == [1, 1]
    files = correct.rows(home, "select source_file, count(*) from erasures where kind = 'file' group by source_file")
    assert [count for _, count in files] == [1, 1, 1, 1]
    assert told_apart(home) == before
    assert reconcile(home, None).differences == []


@pytest.mark.homes
def test_an_interrupted_batch_is_finished_first(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    land(home, "events/eu/c.jsonl", [event("e-40", user_id=ANNA)])
    batch = Checkpoint(home, "events").plan([home.landing_path / "events/eu/c.jsonl"])
    with pytest.raises(KeyboardInterrupt):
        run_batch(home, "events", batch, fail_after=Step.EVENTS, monkeypatch=monkeypatch)
    with pytest.raises(AdtallyError, match=f"batch {batch} of events was interrupted"):
        erase(home, [ANNA], now=NOW)
    assert _count(home, ANNA) > 0
    assert run_batch(home, "events", batch).accepted == 1
    Checkpoint(home, "events").end(batch)
    erased(home, ANNA)


def test_who_is_nobody_cannot_be_erased(home: Settings) -> None:
    for wrong, words in (("", "no user id"), ("x" * 129, "no user id"), ("Unknown", "stands for everybody")):
        with pytest.raises(UsageError, match=words):
            erase(home, [wrong], now=NOW)
    erased(home, ANNA)
    with pytest.raises(UsageError, match="token of a person"):
        erase(home, [_token(home)], now=NOW)


def test_a_lost_key_is_said(home: Settings) -> None:
    erased(home, ANNA)
    for path in home.home_path.rglob("_adtally/erasure/key"):
        path.unlink()
    land(home, "events/eu/c.jsonl", [event("e-40", user_id=ANNA)])
    with pytest.raises(ConfigurationError, match="restore it from a backup"):
        ingest(home, "events")


@pytest.mark.homes
def test_the_queue_is_carried_out_in_one_rewrite(home: Settings) -> None:
    asked = NOW - timedelta(days=3)
    assert queue_erasure(home, [ANNA, BERT], asked) == 2
    assert queue_erasure(home, [ANNA], NOW) == 0
    assert [one.due_at(home) for one in queued_erasures(home)] == [asked + timedelta(days=30)] * 2
    (run,) = erase(home, now=NOW)
    assert set(run.tokens) == {ANNA, BERT}
    prove(home, run, now=NOW)
    assert queued_erasures(home) == []
    assert correct.rows(home, "select distinct requested_at from erasures where kind = 'receipt'") == [(asked,)]


def test_a_preview_says_where_and_changes_nothing(home: Settings) -> None:
    before = {path: path.read_bytes() for path in home.home_path.rglob("*") if path.is_file()}
    found = preview(home, [ANNA])
    assert found.lines == {"events/eu/a.jsonl": 4, "events/eu/b.jsonl.gz": 6, "orders/eu/a.jsonl": 3, "orders/eu/b.jsonl": 2}
    assert found.rows["events"] == _count(home, ANNA)
    assert found.rows["rejected_events"] == 4  # with the conflict of Cara that names the fingerprint of Anna's event
    assert {path: path.read_bytes() for path in home.home_path.rglob("*") if path.is_file()} == before
    assert preview(home, ["user-of-nowhere"]).is_empty


@pytest.mark.homes
def test_operators_lists_and_kept_rule_sets_name_the_token(home: Settings) -> None:
    rules = home.rules_path
    rules.mkdir()
    (rules / "users.txt").write_text(f"# ours\n{ANNA}\nuser-other\n")
    (rules / "invalid_traffic.toml").write_text('list_file = "users.txt"\n')
    land(home, "events/eu/c.jsonl", [event("e-50", user_id=ANNA, event_type="click", campaign_id="c-cpc")])
    ingest(home, "events")
    before = told_apart(home)
    assert correct.rows(home, "select invalid_traffic_rule from events where event_id = 'e-50'") == [("listed_user",)]
    erased(home, ANNA)
    token = _token(home)
    assert (rules / "users.txt").read_text() == f"# ours\n{token}\nuser-other\n"
    assert any(token in content for (content,) in correct.rows(home, "select content from rule_sets"))
    land(home, "events/eu/d.jsonl", [event("e-51", user_id=ANNA, event_type="click", campaign_id="c-cpc")])
    ingest(home, "events")
    assert correct.rows(home, "select invalid_traffic_rule from events where event_id = 'e-51'") == [("listed_user",)]
    assert reconcile(home, None).differences == []
    assert [row for row in told_apart(home)["events"] if row[0] != "e-51"] == before["events"]


def _token(settings: Settings) -> str:
    """The token of the only person who is erased."""
    found = read_suppression(settings)
    assert found is not None
    (token,) = found.tokens.values()
    return token
