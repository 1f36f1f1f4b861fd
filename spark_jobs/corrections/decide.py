"""Decide a correction from the differences that a comparison found: which rows to add to each table and which to remove.

Accepted and rejected records are replaced: a table gets the rows that the recount expects, with the identity of their batch, and
loses all others. `minute_metrics` and `batch_ledger` get further rows with the difference. They lose only rows that no batch can
have written: a row that occurs twice, or a ledger row that does not add up. The ingest's own transforms make the rows from the
records that the recount read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spark_jobs.audit.checkpoints import cluster_of, is_of_kafka
from spark_jobs.audit.compare import LEDGER_MEASURES
from spark_jobs.audit.compare_events import METRIC_MEASURES
from spark_jobs.audit.engine import Recount
from spark_jobs.audit.inputs import BatchState
from spark_jobs.audit.plans import LIMITS
from spark_jobs.audit.store import RawChunk
from spark_jobs.audit.worker import ChunkTask, raw_values
from spark_jobs.corrections.run import Run, increment_rows, restate, table_rows
from spark_jobs.corrections.write_ahead import Correction, TableChange
from spark_jobs.erasure.suppression import Suppression, read_suppression
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.contract.exact import validate_line
from spark_jobs.ingest.contract.parse import encode_raw, parse_all
from spark_jobs.ingest.contract.spec import CONTRACTS, EVENT_CONTRACT, BatchLimits, Contract
from spark_jobs.ingest.dedupe.keys import hash_keys, hex_fingerprint
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.files.lines import read_lines
from spark_jobs.ingest.stage import raw_lines
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS, ORDERS, REJECTED_EVENTS, REJECTED_ORDERS, Table
from spark_jobs.units import DAY_US, HOUR_US, NO_HOUR

Row = dict[str, Any]
"""A row of a table, or of a comparison, by column name."""


def decide(recount: Recount, run: Run, explanation: TableChange) -> Correction:
    """Return the correction of the differences that a comparison left in ``recount``, with the rows that explain it."""
    if recount.inputs.stream == "orders":
        changes = [_orders(recount, run), _rejects(recount, run), _ledger(recount, run)]
    else:
        changes = [_events(recount, run), _rejects(recount, run), _metrics(recount, run), _ledger(recount, run)]
        changes.append(_restatements(recount, run))
    changes = [change for change in (*changes, explanation) if not change.is_empty]
    versions = recount.inputs.versions
    return Correction(run.token, run.run_id, versions.get(EVENTS.name), changes, versions.get(ORDERS.name), run.act(changes))


def _found_rows(recount: Recount, name: str, table: Table) -> pa.Table:
    """Return the rows of ``table`` that a comparison left in its own table ``name``."""
    return recount.database.arrow(f"select {', '.join(table.schema.names)} from {name}").cast(table.schema)


# --- events and orders


def _fingerprints(rows: pa.Table) -> pa.ChunkedArray:
    """Return the fingerprints of events, as the signed numbers in the tables."""
    if not rows.num_rows:
        return pa.chunked_array([], pa.int64())
    names = ("event_id", *(spec.name for spec in EVENT_CONTRACT.payload))
    kinds = {"event_time": pa.int64(), "price_micros": pa.int64()}
    payload = pa.table({name: rows[name].cast(kinds.get(name, pa.string())) for name in names})
    hashed = hash_keys(payload.combine_chunks(), EVENT_CONTRACT)["fingerprint"]
    return pa.chunked_array([chunk.view(pa.int64()) for chunk in hashed.chunks], pa.int64())


def _events(recount: Recount, run: Run) -> TableChange:
    lost = _lost_rows(recount, "events_lost", "record_id as event_id", "time_us as event_time")
    hours = lost["hour"].to_numpy()
    add = table_rows(
        EVENTS,
        lost,
        fingerprint=_fingerprints(lost),
        event_date=pa.array((hours // 24).astype(np.int32)),
        event_hour=pa.array((hours % 24).astype(np.int32)),
        _run_id=run.run_id,
    )
    remove = _found_rows(recount, "events_over", EVENTS)
    metadata = _metadata(recount, run)
    if remove.num_rows:
        are_copies = recount.database.arrow("select is_copy from events_over")["is_copy"].to_pylist()
        metadata["keys"] = "kept" if _keys_stay(remove, are_copies, add) else "changed"
    return TableChange(EVENTS, remove, add, metadata)


def _orders(recount: Recount, run: Run) -> TableChange:
    """Replace each order that differs. Attribution sees both rows (attribution/inputs.py)."""
    lost = _lost_rows(recount, "orders_lost", "time_us as order_time", "cancelled_us as cancelled_at")
    add = table_rows(ORDERS, lost, _run_id=run.run_id)
    return TableChange(ORDERS, _found_rows(recount, "orders_over", ORDERS), add, _metadata(recount, run))


def _lost_rows(recount: Recount, name: str, *renamed: str) -> pa.Table:
    """Return the records that a comparison left in its table ``name``, with the column names of the lake's table."""
    return recount.database.arrow(
        f"""
        select * rename ({", ".join(renamed)}, received_us as received_at, name as source_file, line as source_line,
            ingested_us as ingested_at, query_id as _query_id, batch_id as _batch_id) from {name}
        """
    )


def _keys_stay(remove: pa.Table, are_copies: list[bool], add: pa.Table) -> bool:
    """Return whether the table keeps each removed (id, fingerprint): it is added again, or another copy of the row stays."""
    kept = set(zip(add["event_id"].to_pylist(), add["fingerprint"].to_pylist(), strict=True))
    columns = (remove["event_id"].to_pylist(), remove["fingerprint"].to_pylist(), _fingerprints(remove).to_pylist())
    return all(
        (event_id, stored) in kept or (is_copy and stored == true)
        for event_id, stored, true, is_copy in zip(*columns, are_copies, strict=True)
    )


def _metadata(recount: Recount, run: Run) -> dict[str, Any]:
    """Return the metadata of the commit: the run and, as the ingest stores it, the plan of the batch that takes missed input."""
    metadata: dict[str, Any] = {"correction": {"run_id": run.run_id, "kind": run.kind}}
    for plan, state in zip(recount.inputs.plans, recount.inputs.states, strict=True):
        if state is BatchState.MISSED and plan.query_id == run.token:
            metadata |= {
                "query_id": plan.query_id,
                "batch_id": plan.batch_id,
                "limits": {name: getattr(plan, name) for name in LIMITS},
                "campaigns_version": plan.campaigns_version,
                "files": [[file.modified_ms, f"{recount.settings.landing_uri}/{file.name}", file.size] for file in plan.files],
                "ranges": [[part.name, part.start, part.end] for part in plan.ranges],
            }
    return metadata


# --- rejected_events and rejected_orders


def _rejects(recount: Recount, run: Run) -> TableChange:
    stream = recount.inputs.stream
    table, contract = (REJECTED_ORDERS if stream == "orders" else REJECTED_EVENTS), CONTRACTS[stream]
    lost = recount.database.arrow(
        """
        select l.* exclude (query_id, batch_id, ingested_us, state, rule_set), batches.*,
            coalesce(h.earliest_us, batches.earliest_us) as judged_earliest_us,
            coalesce(h.future_skew_us, batches.future_skew_us) as judged_skew_us
        from rejects_lost l join batches using (b) left join hour_rules h on h.hour = l.hour and version <= events_version
        where not is_trusted or o < 0 order by o, line
        """
    ).to_pylist()
    fingerprints = _conflict_fingerprints(recount) if stream == "events" else {}
    groups: dict[tuple[int, int, int], list[Row]] = {}
    for row in lost:
        groups.setdefault((row["o"], row["judged_earliest_us"], row["judged_skew_us"]), []).append(row)
    suppression = read_suppression(recount.settings) if groups else None
    made: list[Row] = []
    for (o, earliest_us, skew_us), rows in groups.items():
        if o < 0:
            made += [_reject_row(row, run) | _set_aside_columns(recount, row) for row in rows]
            continue
        entry = recount.inputs.occurrences[o].entry
        assert entry is not None  # it was judged
        limits = BatchLimits(rows[0]["ingested_us"], earliest_us, skew_us, rows[0]["hour_grace_us"])
        if isinstance(entry.raw, RawChunk):
            raws = dict(_raw_values(entry.raw, contract, rows, limits, recount.settings.scratch_path))
        else:
            raws = dict(_raw_lines(entry.raw.path, contract, rows, limits, suppression))
        for row in rows:
            if row["line"] not in raws:
                raise AdtallyError(
                    f"{row['name']}, line {row['line']}: rejected by the recount, but not by the ingest",
                    hint="report it; nothing was changed",
                )
            own = row.get("fingerprint"), row.get("accepted_fingerprint")  # only a recount of orders has them
            fingerprint, accepted = fingerprints.get((o, row["line"]), own)
            added = raws[row["line"]] | {"fingerprint": fingerprint, "accepted_fingerprint": accepted}
            if row["records"] is not None:  # the row counts several records
                added |= dict.fromkeys((*(added.keys() - {"reason_codes"}), "record_id"))
            made.append(_reject_row(row, run) | added)
    return TableChange(table, _found_rows(recount, "rejects_over", table), pa.Table.from_pylist(made, table.schema))


def _reject_row(row: Row, run: Run) -> Row:
    """Return a rejected record as a row of its table, without its raw text, reasons and fingerprints."""
    made = {
        "outcome": row["outcome"],
        "source": "files",
        "region": row["region"],
        "source_file": row["name"],
        "source_line": row["line"],
        "record_id": row["record_id"],
        "record_time": row["time_us"],
        "ingested_at": row["ingested_us"],
        "ingested_date": row["ingested_us"] // DAY_US,
        "_query_id": row["query_id"],
        "_batch_id": row["batch_id"],
        "_run_id": run.run_id,
        "records": row["records"],
    }
    if is_of_kafka(row["name"]):
        _, cluster, topic, partition = row["name"].split("/")
        made |= {"source": "kafka", "region": cluster, "source_topic": topic, "source_partition": int(partition)}
        made["source_offset"] = row["line"]
    return made


def _raw_columns(reasons: list[str], raw: str, encoding: str, size: int) -> Row:
    return {"reason_codes": reasons, "raw": raw, "raw_encoding": encoding, "raw_size_bytes": size}


def _set_aside_columns(recount: Recount, row: Row) -> Row:
    """Return reason and raw text of input that a batch did not read, from the batch's plan."""
    plan = next(one for one in recount.inputs.plans if (one.query_id, one.batch_id) == (row["query_id"], row["batch_id"]))
    (aside,) = (one for one in plan.set_aside if (one.name, one.start) == (row["name"], row["line"]))
    raw, encoding = encode_raw(aside.cause.encode("utf-8", "backslashreplace"))
    return _raw_columns([aside.reason], raw, encoding, len(raw))


def _raw_lines(
    path: str, contract: Contract, rows: list[Row], limits: BatchLimits, suppression: Suppression | None
) -> Iterator[tuple[int, Row]]:
    """Read the lines of ``rows`` again from their file. Yields each line's number, and its reasons and raw text."""
    name, region = rows[0]["name"], rows[0]["region"]
    conflicts = np.array([row["line"] - 1 for row in rows if row["outcome"] == "conflict"], dtype=np.int64)
    for number, raw, encoding, size in raw_lines(Split(0, path, name, region, 0, None), conflicts, suppression):
        yield number + 1, _raw_columns(["conflict"], raw, encoding, size)
    wanted = {row["line"] for row in rows}
    if len(conflicts) < len(rows):
        for parsed in parse_all(read_lines(path), contract, region, limits, suppression=suppression):
            for found in parsed.rejects:
                if found.number + 1 in wanted:
                    yield found.number + 1, _raw_columns(found.reasons, found.raw, found.raw_encoding, found.raw_size_bytes)


def _raw_values(
    chunk: RawChunk, contract: Contract, rows: list[Row], limits: BatchLimits, scratch: Path
) -> Iterator[tuple[int, Row]]:
    """Read the records of ``rows`` again from the table of raw records. Yields as `_raw_lines`, by offset."""
    conflicts = {row["line"] for row in rows if row["outcome"] == "conflict"}
    task = ChunkTask(chunk.name, chunk.start, chunk.end, chunk.table_id, chunk.paths(), contract.stream, str(scratch / "raw"))
    for offsets, values in raw_values(task, [row["line"] for row in rows], cut=False):
        for offset, value in zip(offsets.tolist(), (value or b"" for value in values), strict=True):
            verdict = validate_line(value, contract, cluster_of(chunk.name), limits, own_region=True)
            reasons = ["conflict"] if offset in conflicts else verdict.reasons
            if reasons:
                yield offset, _raw_columns(reasons, *encode_raw(value), len(value))


def _conflict_fingerprints(recount: Recount) -> dict[tuple[int, int], tuple[str, str]]:
    """Return for each lost conflict, by (occurrence, line), its fingerprint and that of the accepted record, in hex digits."""
    both = []
    for place in (("o", "line"), ("holder_o", "holder_line")):
        rows = recount.database.arrow(
            f"""
            select l.o as at_o, l.line as at_line, r.* rename (record_id as event_id, time_us as event_time)
            from rejects_lost l join ranked r on r.o = l.{place[0]} and r.line = l.{place[1]}
            where l.outcome = 'conflict' and not l.is_trusted order by l.o, l.line
            """
        )
        places = list(zip(rows["at_o"].to_pylist(), rows["at_line"].to_pylist(), strict=True))
        both.append(dict(zip(places, map(hex_fingerprint, _fingerprints(rows).to_pylist()), strict=True)))
    return {place: (own, both[1][place]) for place, own in both[0].items()}


# --- minute_metrics, batch_ledger, restatements


def _metrics(recount: Recount, run: Run) -> TableChange:
    present = recount.database.values("select record_uuid from held_metrics where copy = 1")
    differences = recount.database.arrow(
        "select * rename (minute_us as event_minute_us, query_id as _query_id, batch_id as _batch_id) from metrics_delta"
    )
    add = increment_rows(differences, run, pa.array(present, pa.string()))
    return TableChange(MINUTE_METRICS, _found_rows(recount, "metrics_over", MINUTE_METRICS), add)


def _ledger(recount: Recount, run: Run) -> TableChange:
    """Add the differences per batch and cell. A run has one row per cell: the sum replaces a row that it wrote before.

    A row in place of a lost one of a file also says when its newest record was received: hours close by that. Of a topic nobody
    knows how far its partitions were.
    """
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
    remove = pa.concat_tables([_found_rows(recount, name, BATCH_LEDGER) for name in ("ledger_over", "ledger_before")])
    counts = ", ".join(f"d.{name} + coalesce(t.{name}, 0) as {name}" for name in LEDGER_MEASURES)
    rows = recount.database.arrow(
        f"""
        select d.query_id as _query_id, d.batch_id as _batch_id, d.source, d.region, {counts},
            coalesce(batches.ingested_us, {run.now_us}) as ingested_at,
            if(d.hour = {NO_HOUR}, null, d.hour * {HOUR_US}) as event_hour,
            coalesce(epoch_us(t.max_received_at), if(d.source = 'files' and not exists (
                from held_ledger t where not (is_copy or is_broken) and max_received_at is not null and {cell}
            ), r.max_us, null)) as max_received_at
        from ledger_delta d left join batches using (query_id, batch_id) left join ledger_before t on {cell}
            left join (
                select query_id, batch_id, source, source_region as region, hour, max(received_us) as max_us
                from expected where outcome = 'accepted' group by all
            ) r on r.query_id = d.query_id and r.batch_id = d.batch_id and r.source = d.source
                and r.region is not distinct from d.region and r.hour is not distinct from d.hour
        """
    )
    add = table_rows(BATCH_LEDGER, rows, stream=recount.inputs.stream, _run_id=run.run_id)
    return TableChange(BATCH_LEDGER, remove, add)


def _restatements(recount: Recount, run: Run) -> TableChange:
    """Explain the changes of the increments, per hour, region, campaign, currency and cause."""
    sums = ", ".join(f"sum({name}) as {name}" for name in METRIC_MEASURES)
    less = ", ".join(f"-coalesce({name}, 0) as {name}" for name in METRIC_MEASURES)
    rows = recount.database.arrow(
        f"""
        select hour * {HOUR_US} as event_hour, region, campaign_id, currency, cause, {sums} from (
            select hour, region, campaign_id, currency, cause, {", ".join(METRIC_MEASURES)} from metrics_delta
            union all by name
            select hour, region, campaign_id, currency, 'increment_twice' as cause, {less} from metrics_over
        ) group by all
        """
    )
    return restate(rows, run)
