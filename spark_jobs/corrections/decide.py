"""From what a comparison found to a correction: the rows that each table gets and loses.

`events` and `rejected_events` get the rows that the recount expects, under the identity of the batch that they belong to, and lose
those that it does not. `minute_metrics` and `batch_ledger` get further rows, the difference; they lose only rows that no batch can
have written (one that stands twice, a ledger row that does not add up). Rows are made by the ingest's own transforms, from what the
recount read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.audit.checkpoints import cluster_of
from spark_jobs.audit.compare import LEDGER_MEASURES
from spark_jobs.audit.compare_events import METRIC_MEASURES
from spark_jobs.audit.engine import Recount
from spark_jobs.audit.inputs import BatchState
from spark_jobs.audit.store import RawChunk
from spark_jobs.audit.worker import ChunkTask, raw_values
from spark_jobs.corrections.run import Run, table_rows
from spark_jobs.corrections.write_ahead import Correction, TableChange
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.contract.exact import validate_line
from spark_jobs.ingest.contract.parse import encode_raw, parse_all
from spark_jobs.ingest.contract.spec import CONTRACTS, EVENT_CONTRACT, BatchLimits, Contract
from spark_jobs.ingest.dedupe.keys import hash_keys, hex_fingerprint
from spark_jobs.ingest.event_columns import INCREMENT_SCHEMA, increment_columns
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.files.lines import read_lines
from spark_jobs.ingest.stage import raw_lines
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
    EVENTS,
    MINUTE_METRICS,
    ORDERS,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    RESTATEMENTS,
    Table,
)
from spark_jobs.units import HOUR_US, NO_HOUR


def decide(recount: Recount, run: Run) -> Correction:
    """The correction of what a comparison has left in ``recount``: of the hours that it was run for."""
    if recount.inputs.stream == "orders":
        changes = [_orders(recount, run), _rejects(recount, run), _ledger(recount, run)]
        version = recount.inputs.versions[ORDERS.name]
        return Correction(run.token, run.run_id, None, [c for c in changes if not c.is_nothing], version)
    changes = [_events(recount, run), _rejects(recount, run), _metrics(recount, run), _ledger(recount, run)]
    changes.append(_restatements(recount, run))
    return Correction(run.token, run.run_id, recount.inputs.versions[EVENTS.name], [c for c in changes if not c.is_nothing])


def _held(recount: Recount, name: str, table: Table) -> pa.Table:
    """Rows that a comparison keeps in table ``name``, as rows of ``table``."""
    return recount.database.arrow(f"select {', '.join(table.schema.names)} from {name}").cast(table.schema)


# --- events


def _payload(rows: pa.Table) -> pa.Table:
    """What the fingerprint is made of, from rows with event_id and event_time (microseconds): as the ingest holds it."""
    names = ("event_id", *(spec.name for spec in EVENT_CONTRACT.payload))
    kinds = {"event_time": pa.int64(), "price_micros": pa.int64()}
    return pa.table({name: rows[name].cast(kinds.get(name, pa.string())) for name in names})


def _fingerprints(rows: pa.Table) -> pa.ChunkedArray:
    """Fingerprints (uint64) of rows as ``_payload`` takes them."""
    if not rows.num_rows:
        return pa.chunked_array([], pa.uint64())
    return hash_keys(_payload(rows).combine_chunks(), EVENT_CONTRACT)["fingerprint"]


def _signed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.view(pa.int64()) for chunk in column.chunks], pa.int64())


def _events(recount: Recount, run: Run) -> TableChange:
    lost = recount.database.arrow(
        """
        select * rename (record_id as event_id, time_us as event_time, received_us as received_at, name as source_file,
            line as source_line, ingested_us as ingested_at, query_id as _query_id, batch_id as _batch_id) from events_lost
        """,
    )
    hours = lost["hour"].to_numpy()
    add = table_rows(
        EVENTS,
        {
            **{name: lost[name] for name in EVENTS.schema.names if name in lost.column_names},
            "fingerprint": _signed(_fingerprints(lost)),
            "event_date": pa.array((hours // 24).astype(np.int32)),
            "event_hour": pa.array((hours % 24).astype(np.int32)),
            "_run_id": run.run_id,
        },
        lost.num_rows,
    )
    remove = _held(recount, "events_over", EVENTS)
    metadata: dict[str, Any] = {"correction": {"run_id": run.run_id, "kind": run.kind}}
    if remove.num_rows:
        metadata["keys"] = (
            "kept" if _keys_stay(remove, recount.database.arrow("select is_copy from events_over"), add) else "changed"
        )
    return TableChange(EVENTS, remove, add, metadata | _plan_of_missed(recount, run))


def _keys_stay(remove: pa.Table, copies: pa.Table, add: pa.Table) -> bool:
    """Whether each removed (id, fingerprint) still stands in the table: put back, or of a row of which another copy stays."""
    times = remove.set_column(remove.schema.get_field_index("event_time"), "event_time", remove["event_time"].cast(pa.int64()))
    true = _signed(_fingerprints(times)).to_pylist()
    kept = set(zip(add["event_id"].to_pylist(), add["fingerprint"].to_pylist(), strict=True))
    rows = zip(
        *(remove[name].to_pylist() for name in ("event_id", "fingerprint")), true, copies["is_copy"].to_pylist(), strict=True
    )
    return all((name, held) in kept or (is_copy and held == payload) for name, held, payload, is_copy in rows)


def _plan_of_missed(recount: Recount, run: Run) -> dict[str, Any]:
    """The plan of the batch that takes the missed files or records, as a batch of the ingest would store its own."""
    for plan, state in zip(recount.inputs.plans, recount.inputs.states, strict=True):
        if state is BatchState.MISSED and plan.query_id == run.token:
            return {
                "query_id": plan.query_id,
                "batch_id": plan.batch_id,
                "limits": {name: getattr(plan, name) for name in ("ingested_us", "earliest_us", "future_skew_us", "hour_grace_us")},
                "campaigns_version": plan.campaigns_version,
                "files": [[file.modified_ms, str(recount.settings.landing_path / file.name), file.size] for file in plan.files],
                "ranges": [[part.name, part.start, part.end] for part in plan.ranges],
            }
    return {}


# --- orders


def _orders(recount: Recount, run: Run) -> TableChange:
    """An order that differs goes, and comes back as all of its records say. Attribution sees both (attribution/inputs.py)."""
    lost = recount.database.arrow(
        """
        select * rename (time_us as order_time, received_us as received_at, cancelled_us as cancelled_at, name as source_file,
            line as source_line, ingested_us as ingested_at, query_id as _query_id, batch_id as _batch_id) from orders_lost
        """,
    )
    columns = {name: lost[name] for name in ORDERS.schema.names if name in lost.column_names}
    add = table_rows(ORDERS, columns | {"_run_id": run.run_id}, lost.num_rows)
    metadata: dict[str, Any] = {"correction": {"run_id": run.run_id, "kind": run.kind}}
    return TableChange(ORDERS, _held(recount, "orders_over", ORDERS), add, metadata | _plan_of_missed(recount, run))


# --- rejected_events and rejected_orders


def _rejects(recount: Recount, run: Run) -> TableChange:
    stream = recount.inputs.stream
    table, contract = (REJECTED_ORDERS if stream == "orders" else REJECTED_EVENTS), CONTRACTS[stream]
    remove = _held(recount, "rejects_over", table)
    lost = recount.database.arrow(
        """
        select l.* exclude (query_id, batch_id, ingested_us, state, rule_set), batches.*,
            coalesce(h.earliest_us, batches.earliest_us) as judged_earliest_us,
            coalesce(h.future_skew_us, batches.future_skew_us) as judged_skew_us
        from rejects_lost l join batches using (b) left join hour_rules h on h.hour = l.hour and version <= events_version
        where not is_trusted or o < 0 order by o, line
        """,
    ).to_pylist()
    prints = _conflict_fingerprints(recount) if stream == "events" else _fingerprints_of_orders(lost)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in lost:
        groups.setdefault((row["o"], row["judged_earliest_us"], row["judged_skew_us"]), []).append(row)
    made: list[dict[str, Any]] = []
    for (o, earliest_us, skew_us), rows in groups.items():
        if o < 0:
            made += [_set_aside(recount, row, run) for row in rows]
            continue
        entry = recount.inputs.occurrences[o].entry
        assert entry is not None  # it was judged
        name = entry.name
        limits = BatchLimits(rows[0]["ingested_us"], earliest_us, skew_us, rows[0]["hour_grace_us"])
        if isinstance(entry.raw, RawChunk):
            raws, of_kafka = _raw_records(entry.raw, contract, rows, limits, recount.settings.scratch_path), True
        else:
            raws, of_kafka = _raws(entry.raw.path, name, contract, rows, limits), False
        for row in rows:
            fingerprint, accepted = prints.get((row["o"], row["line"]), (None, None))
            if row["records"] is not None:  # it stands for more than one record
                fingerprint = accepted = row["record_id"] = None
                raws[row["line"]] |= {"raw": None, "raw_encoding": None, "raw_size_bytes": None}
            made.append(
                {
                    "outcome": row["outcome"],
                    "source": "kafka" if of_kafka else "files",
                    "region": cluster_of(name) if of_kafka else row["region"],
                    "source_file": name,
                    "source_line": row["line"],
                    **(_place(name, row["line"]) if of_kafka else {}),
                    **raws[row["line"]],
                    "record_id": row["record_id"],
                    "record_time": row["time_us"],
                    "fingerprint": fingerprint,
                    "accepted_fingerprint": accepted,
                    "ingested_at": row["ingested_us"],
                    "ingested_date": row["ingested_us"] // (24 * HOUR_US),
                    "_query_id": row["query_id"],
                    "_batch_id": row["batch_id"],
                    "_run_id": run.run_id,
                    "records": row["records"],
                }
            )
    return TableChange(table, remove, pa.Table.from_pylist(made, table.schema))


def _set_aside(recount: Recount, row: dict[str, Any], run: Run) -> dict[str, Any]:
    """The row of what a batch did not read, as its plan says."""
    plan = next(one for one in recount.inputs.plans if (one.query_id, one.batch_id) == (row["query_id"], row["batch_id"]))
    (aside,) = (one for one in plan.set_aside if (one.name, one.start) == (row["name"], row["line"]))
    raw, encoding = encode_raw(aside.cause.encode("utf-8", "backslashreplace"))
    return {
        "outcome": "rejected",
        "reason_codes": [aside.reason],
        "source": "kafka" if aside.end else "files",
        "region": row["region"],
        "source_file": aside.name,
        "source_line": aside.start,
        **(_place(aside.name, aside.start) if aside.end else {}),
        "raw": raw,
        "raw_encoding": encoding,
        "raw_size_bytes": len(raw),
        "ingested_at": row["ingested_us"],
        "ingested_date": row["ingested_us"] // (24 * HOUR_US),
        "_query_id": row["query_id"],
        "_batch_id": row["batch_id"],
        "_run_id": run.run_id,
    }


def _raws(path: str, name: str, contract: Contract, rows: list[dict[str, Any]], limits: BatchLimits) -> dict[int, dict[str, Any]]:
    """Reasons and raw text of the lines of ``rows``, read again from the file, by line."""
    conflicts = np.array([row["line"] - 1 for row in rows if row["outcome"] == "conflict"], dtype=np.int64)
    region = rows[0]["region"]
    found = {
        n + 1: {"reason_codes": ["conflict"], "raw": raw, "raw_encoding": encoding, "raw_size_bytes": size}
        for n, raw, encoding, size in raw_lines(Split(0, path, name, region, 0, None), conflicts)
    }
    wanted = {row["line"] for row in rows}
    if len(conflicts) < len(rows):
        for parsed in parse_all(read_lines(path), contract, region, limits):
            for reject in parsed.rejects:
                line = 0 if reject.number < 0 else reject.number + 1
                if line not in wanted:
                    continue
                found[line] = {
                    "reason_codes": reject.reasons,
                    "raw": reject.raw,
                    "raw_encoding": reject.raw_encoding,
                    "raw_size_bytes": reject.raw_size_bytes,
                }
    return _all_known(name, rows, found)


def _all_known(name: str, rows: list[dict[str, Any]], found: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    unknown = [row["line"] for row in rows if row["line"] not in found]
    if unknown:
        raise AdtallyError(
            f"{name}, line {unknown[0]}: rejected by the recount, but not by the ingest", hint="report it; nothing was changed"
        )
    return found


def _place(name: str, offset: int) -> dict[str, Any]:
    """Where a record of Kafka lies, in columns of its own."""
    _, _, topic, partition = name.split("/")
    return {"source_topic": topic, "source_partition": int(partition), "source_offset": offset}


def _raw_records(
    chunk: RawChunk, contract: Contract, rows: list[dict[str, Any]], limits: BatchLimits, scratch: Path
) -> dict[int, dict[str, Any]]:
    """As ``_raws``, of records of Kafka, read again from the table of raw records, by offset."""
    conflicts = {row["line"] for row in rows if row["outcome"] == "conflict"}
    task = ChunkTask(chunk.name, chunk.start, chunk.end, chunk.table_id, chunk.paths(), contract.stream, str(scratch / "raw"))
    found = {}
    for offsets, values in raw_values(task, [row["line"] for row in rows], cut=False):
        for offset, value in zip(offsets.tolist(), (value or b"" for value in values), strict=True):
            verdict = validate_line(value, contract, cluster_of(chunk.name), limits, own_region=True)
            reasons = ["conflict"] if offset in conflicts else verdict.reasons
            raw, encoding = encode_raw(value)
            if reasons:
                found[offset] = {"reason_codes": reasons, "raw": raw, "raw_encoding": encoding, "raw_size_bytes": len(value)}
    return _all_known(chunk.name, rows, found)


def _fingerprints_of_orders(lost: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[str, str]]:
    """As ``_conflict_fingerprints``: a recount of orders has them."""
    return {(row["o"], row["line"]): (row["fingerprint"], row["accepted_fingerprint"]) for row in lost}


def _conflict_fingerprints(recount: Recount) -> dict[tuple[int, int], tuple[str, str]]:
    """(occurrence, line) of a lost conflict -> its fingerprint and that of the record which holds the id, as people see them."""
    both = []
    for place in (("o", "line"), ("holder_o", "holder_line")):
        rows = recount.database.arrow(
            f"""
            select l.o as at_o, l.line as at_line, r.* rename (record_id as event_id, time_us as event_time)
            from rejects_lost l join ranked r on r.o = l.{place[0]} and r.line = l.{place[1]}
            where l.outcome = 'conflict' and not l.is_trusted order by l.o, l.line
            """,
        )
        places = list(zip(rows["at_o"].to_pylist(), rows["at_line"].to_pylist(), strict=True))
        both.append(dict(zip(places, map(hex_fingerprint, _fingerprints(rows).to_pylist()), strict=True)))
    return {place: (own, both[1][place]) for place, own in both[0].items()}


# --- minute_metrics


def _metrics(recount: Recount, run: Run) -> TableChange:
    remove = _held(recount, "metrics_over", MINUTE_METRICS)
    present = {uuid for (uuid,) in recount.database.rows("select record_uuid from held_metrics where copy = 1")}
    deltas = recount.database.arrow("select * rename (minute_us as event_minute_us) from metrics_delta order by query_id, batch_id")
    parts = [MINUTE_METRICS.schema.empty_table()]
    identities = set(zip(deltas["query_id"].to_pylist(), deltas["batch_id"].to_pylist(), strict=True))
    for query_id, batch_id in sorted(identities, key=repr):
        own = deltas.filter(pc.and_(pc.equal(deltas["query_id"], query_id), pc.equal(deltas["batch_id"], batch_id)))
        sums = own.select(INCREMENT_SCHEMA.names).cast(INCREMENT_SCHEMA)
        named = increment_columns(sums, query_id, batch_id)
        taken = pc.is_in(named["record_uuid"], value_set=pa.array(sorted(present), pa.string()))
        # what the batch should have written is written as the batch would; anything else under a name of the run's own
        further = increment_columns(sums.filter(taken), f"{run.token}:{query_id}", batch_id)
        for rows in (named.filter(pc.invert(taken)), further):
            columns = {name: rows[name] for name in MINUTE_METRICS.schema.names if name in rows.column_names}
            identity = {"_query_id": query_id, "_batch_id": batch_id, "_run_id": run.run_id}
            parts.append(table_rows(MINUTE_METRICS, {**columns, **identity}, rows.num_rows))
    return TableChange(MINUTE_METRICS, remove, pa.concat_tables(parts))


# --- batch_ledger


def _ledger(recount: Recount, run: Run) -> TableChange:
    """A run has one row a cell: one that it has written before is replaced by the sum."""
    recount.database.execute("create or replace temp table this_run as select ?::varchar as run_id", [run.run_id])
    cell = "d.query_id = _query_id and d.batch_id = _batch_id and d.source = t.source"
    cell += " and d.region is not distinct from t.region and d.hour = t.hour"
    recount.database.execute(
        f"""
        create or replace temp table ledger_before as
        select t.* from held_ledger t where not (is_copy or is_broken) and _run_id in (from this_run)
            and exists (from ledger_delta d where {cell})
        """
    )
    remove = pa.concat_tables([_held(recount, name, BATCH_LEDGER) for name in ("ledger_over", "ledger_before")])
    counts = ", ".join(f"d.{name} + coalesce(t.{name}, 0) as {name}" for name in LEDGER_MEASURES)
    rows = recount.database.arrow(
        f"""
        select d.query_id, d.batch_id, d.source, d.region, {counts}, coalesce(batches.ingested_us, {run.now_us}) as ingested_us,
            if(d.hour = {NO_HOUR}, null, d.hour * {HOUR_US}) as hour_us
        from ledger_delta d left join batches using (query_id, batch_id) left join ledger_before t on {cell}
        """,
    )
    columns = {
        "stream": recount.inputs.stream,
        "source": rows["source"],
        "region": rows["region"],
        "event_hour": rows["hour_us"],
        **{name: rows[name] for name in LEDGER_MEASURES},
        "ingested_at": rows["ingested_us"],
        "_query_id": rows["query_id"],
        "_batch_id": rows["batch_id"],
        "_run_id": run.run_id,
    }
    return TableChange(BATCH_LEDGER, remove, table_rows(BATCH_LEDGER, columns, rows.num_rows))


# --- why, with the money


def _restatements(recount: Recount, run: Run) -> TableChange:
    """What the published increments change by, per hour, region, campaign, currency and cause."""
    sums = ", ".join(f"sum({name}) as {name}" for name in METRIC_MEASURES)
    less = ", ".join(f"-coalesce({name}, 0) as {name}" for name in METRIC_MEASURES)
    rows = recount.database.arrow(
        f"""
        select hour * {HOUR_US} as event_hour, region, campaign_id, currency, cause, {sums} from (
            select hour, region, campaign_id, currency, cause, {", ".join(METRIC_MEASURES)} from metrics_delta
            union all by name
            select hour, region, campaign_id, currency, 'increment_twice' as cause, {less} from metrics_over
        ) group by all
        """,
    )
    columns = {
        **{name: rows[name] for name in rows.column_names},
        "run_id": run.run_id,
        "kind": run.kind,
        "reason": run.reason,
        "rule_set": run.rule_set,
        "restated_at": run.now_us,
    }
    return TableChange(RESTATEMENTS, RESTATEMENTS.schema.empty_table(), table_rows(RESTATEMENTS, columns, rows.num_rows))
