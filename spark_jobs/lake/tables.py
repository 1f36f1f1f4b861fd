"""The registry of the Delta tables: name, schema, partitioning, key and meaning of each.

``_query_id`` and ``_batch_id`` name the batch of a row; ``_run_id`` the correction run that wrote it, null if the batch wrote it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa

STREAMS = ("events", "orders")
"""The streams of records; each has its tables."""

_TYPES = {
    "STRING": pa.string(),
    "BIGINT": pa.int64(),
    "DECIMAL(38,0)": pa.decimal128(38, 0),  # a sum of money; the amount of one record, 10^15 nanos at most, is a BIGINT
    "INT": pa.int32(),
    "BOOLEAN": pa.bool_(),
    "DATE": pa.date32(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
    "DOUBLE": pa.float64(),
    "BINARY": pa.binary(),
    "ARRAY<STRING>": pa.list_(pa.string()),
    "ARRAY<BIGINT>": pa.list_(pa.int64()),
    "ARRAY<DOUBLE>": pa.list_(pa.float64()),
}


CHAIN_COLUMNS = ("chain_position", "previous_hash", "row_hash")
"""The columns of a table whose rows are hash-chained (docs/tamper-evidence.md): place from 1, hash of the row before, own hash."""

_CHAIN = "chain_position BIGINT, previous_hash STRING, row_hash STRING"


@dataclass(frozen=True)
class Table:
    """A Delta table under the lakehouse root.

    ``columns`` is a DDL list in column order; ``key`` identifies a row; Delta keeps minimum and maximum of ``stats_columns`` per
    file (wide text columns would cost time and prune nothing).
    """

    name: str
    grain: str
    columns: str
    key: tuple[str, ...]
    stats_columns: tuple[str, ...]
    partition_by: tuple[str, ...] = ()

    @cached_property
    def types(self) -> dict[str, str]:
        """The DDL types of the columns."""
        return dict(column.split() for column in re.split(r",\s+", self.columns.strip()))

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns as an Arrow schema."""
        return pa.schema([(name, _TYPES[kind]) for name, kind in self.types.items()])

    @cached_property
    def stored_schema(self) -> pa.Schema:
        """The columns that the data files have: all but the partition columns, whose values are in the log."""
        return pa.schema([field for field in self.schema if field.name not in self.partition_by])

    def schema_of(self, *columns: str) -> pa.Schema:
        """Return the schema of some columns; by default of all stored ones."""
        return pa.schema([self.schema.field(name) for name in columns]) if columns else self.stored_schema


EVENTS = Table(
    name="events",
    grain="one row an accepted event; an event_id occurs once, in the whole table. invalid_traffic_rule is the first rule "
    "that made it invalid (null: billable), invalid_traffic_rules all that hit, rule_set the hash of the rules it was "
    "judged by. spend_nanos is what it is billed (invalid: 0), invalid_spend_nanos what it would have been",
    columns="""
        event_id STRING, event_type STRING, event_time TIMESTAMP, received_at TIMESTAMP, region STRING,
        campaign_id STRING, ad_id STRING, store_id STRING, user_id STRING, impression_id STRING, placement STRING,
        price_micros BIGINT, currency STRING, user_agent STRING,
        billing_model STRING, spend_nanos BIGINT, invalid_spend_nanos BIGINT, is_late BOOLEAN,
        invalid_traffic_rule STRING, invalid_traffic_rules ARRAY<STRING>, rule_set STRING,
        fingerprint BIGINT, source_file STRING, source_line BIGINT, ingested_at TIMESTAMP,
        event_date DATE, event_hour INT, _query_id STRING, _batch_id BIGINT, _run_id STRING
    """,
    key=("event_id",),
    partition_by=("event_date", "event_hour"),
    stats_columns=("event_time", "received_at", "_batch_id"),
)

REJECTED_EVENTS = Table(
    name="rejected_events",
    grain="one row a record that was not accepted and is not a duplicate: outcome 'rejected' (with its reason codes) or "
    "'conflict' (same id, other payload: both fingerprints as 16 hex digits). A file that cannot be read has one row "
    "with line 0. records: how many records the row stands for (null: one). A row for more has no raw text; its place and "
    "time are those of the first of them. Count records by sum(coalesce(records, 1))",
    columns="""
        outcome STRING, reason_codes ARRAY<STRING>, source STRING, region STRING,
        source_file STRING, source_line BIGINT, source_topic STRING, source_partition INT, source_offset BIGINT,
        raw STRING, raw_encoding STRING, raw_size_bytes BIGINT,
        record_id STRING, record_time TIMESTAMP, fingerprint STRING, accepted_fingerprint STRING,
        ingested_at TIMESTAMP, ingested_date DATE, _query_id STRING, _batch_id BIGINT, _run_id STRING, records BIGINT
    """,
    key=("source_file", "source_line"),
    partition_by=("ingested_date",),
    stats_columns=("ingested_at", "_batch_id"),
)

REJECTED_ORDERS = replace(REJECTED_EVENTS, name="rejected_orders", grain="as rejected_events, for orders")

MINUTE_METRICS = Table(
    name="minute_metrics",
    grain="increments, append-only: one row a batch, minute and dimension key; a minute's value is the sum of its rows",
    columns="""
        record_uuid STRING, event_minute TIMESTAMP, region STRING, campaign_id STRING, ad_id STRING, store_id STRING,
        placement STRING, currency STRING, impressions BIGINT, clicks BIGINT, invalid_impressions BIGINT,
        invalid_clicks BIGINT, spend_nanos DECIMAL(38,0), invalid_spend_nanos DECIMAL(38,0),
        event_date DATE, _query_id STRING, _batch_id BIGINT, _run_id STRING
    """,
    key=("record_uuid",),
    partition_by=("event_date",),
    stats_columns=("event_minute", "_batch_id"),
)

BATCH_LEDGER = Table(
    name="batch_ledger",
    grain="one row a query, batch, source, region and event hour (null: the record had no readable time). Written last: "
    "a batch is complete when it stands here. offered = accepted + duplicate + conflict + rejected; late, invalid_traffic "
    "and unpriced are parts of accepted. lost_offsets: Kafka's offsets that the batch went past by an operator's decision "
    "(source_gaps). A correction run adds rows of its own (_run_id), whose counts are differences",
    columns="""
        stream STRING, source STRING, region STRING, event_hour TIMESTAMP,
        offered BIGINT, accepted BIGINT, duplicate BIGINT, conflict BIGINT, rejected BIGINT,
        late BIGINT, invalid_traffic BIGINT, unpriced BIGINT, spend_nanos DECIMAL(38,0),
        lost_offsets BIGINT, max_received_at TIMESTAMP, ingested_at TIMESTAMP, _query_id STRING, _batch_id BIGINT, _run_id STRING
    """,
    key=("_query_id", "_batch_id", "_run_id", "source", "region", "event_hour"),
    stats_columns=("event_hour", "_batch_id"),
)

ORDERS = Table(
    name="orders",
    grain="one row an order with its latest status; cancelled is final, whichever record came first",
    columns="""
        order_id STRING, order_time TIMESTAMP, received_at TIMESTAMP, region STRING, user_id STRING, store_id STRING,
        total_micros BIGINT, currency STRING, status STRING, cancelled_at TIMESTAMP, has_placed BOOLEAN, is_late BOOLEAN,
        fingerprint BIGINT,
        source_file STRING, source_line BIGINT, ingested_at TIMESTAMP, _query_id STRING, _batch_id BIGINT, _run_id STRING
    """,
    key=("order_id",),
    stats_columns=("order_id", "order_time", "_batch_id"),
)

RAW_EVENTS = Table(
    name="raw_events",
    grain="one row a record of the topic of events, as it came (value null: a tombstone), by a query of its own, so that a "
    "recount needs neither the topic nor the hot path. After a lost checkpoint a record may stand here twice: take one a key",
    columns="""
        cluster STRING, source_topic STRING, source_partition INT, source_offset BIGINT, source_timestamp TIMESTAMP,
        value BINARY, ingested_at TIMESTAMP, ingested_date DATE
    """,
    key=("cluster", "source_topic", "source_partition", "source_offset"),
    partition_by=("ingested_date",),
    stats_columns=("cluster", "source_topic", "source_partition", "source_offset", "source_timestamp"),
)

RAW_ORDERS = replace(RAW_EVENTS, name="raw_orders", grain="as raw_events, for orders")

RAW_TABLES = {"events": RAW_EVENTS, "orders": RAW_ORDERS}
REJECTED_TABLES = {"events": REJECTED_EVENTS, "orders": REJECTED_ORDERS}

SOURCE_GAPS = Table(
    name="source_gaps",
    grain="one row an operator's decision to go on behind records that a topic no longer has: offsets [first_offset, end_offset) "
    "of a partition (end_offset as first_offset: nobody knows how many). topic_id is that of the topic that is read from then on, "
    "source_topic its label: ad-events, and ad-events~2 where the topic was deleted and made anew",
    columns="""
        stream STRING, cluster STRING, source_topic STRING, source_partition INT, first_offset BIGINT, end_offset BIGINT,
        topic_id STRING, reason STRING, accepted_by STRING, accepted_at TIMESTAMP
    """,
    key=("stream", "cluster", "source_topic", "source_partition", "first_offset", "topic_id"),
    stats_columns=("accepted_at",),
)

RELEASES = Table(
    name="releases",
    grain="one row an operator's decision to have a quarantined file read again, under the name released_as. _query_id and "
    "_batch_id are those of the batch that set it aside",
    columns="""
        stream STRING, source_file STRING, released_as STRING, quarantine_reason STRING, reason STRING, released_by STRING,
        released_at TIMESTAMP, _query_id STRING, _batch_id BIGINT
    """,
    key=("source_file", "_query_id", "_batch_id"),
    stats_columns=("released_at",),
)

RAW_RETIREMENTS = Table(
    name="raw_retirements",
    grain="one row a landing file, or range of offsets [first_offset, end_offset) of a partition of a raw table, that was archived "
    "(archived_to) or dropped (null) after it had been recounted and billed. newest_hour is the newest event hour of its batches: "
    "a recount can speak of the hours after the largest one. ingested_date is the day of a raw table's rows",
    columns="""
        stream STRING, source_file STRING, first_offset BIGINT, end_offset BIGINT, ingested_date DATE, size_bytes BIGINT,
        modified_at TIMESTAMP, sha256 STRING, newest_hour TIMESTAMP, archived_to STRING, retired_at TIMESTAMP, run_id STRING
    """,
    key=("stream", "source_file", "first_offset", "modified_at"),
    stats_columns=("newest_hour", "retired_at"),
)

CAMPAIGNS = Table(
    name="campaigns",
    grain="one row a campaign and validity range, as the CSV files of the landing folder say; replaced when they change",
    columns="""
        campaign_id STRING, store_id STRING, billing_model STRING, daily_budget_micros BIGINT, currency STRING,
        valid_from TIMESTAMP, valid_to TIMESTAMP, source_file STRING
    """,
    key=("campaign_id", "valid_from"),
    stats_columns=("campaign_id",),
)

NAMES = Table(
    name="names",
    grain="one row a campaign, ad or store (kind) that has a name for people to read, as the CSV files of the landing folder say; "
    "replaced when they change",
    columns="kind STRING, id STRING, name STRING, source_file STRING",
    key=("kind", "id"),
    stats_columns=("kind",),
)

RECONCILIATIONS = Table(
    name="reconciliations",
    grain="one row a run, hour and finding: layer (events, rejected_events, minute_metrics, batch_ledger, orders, rejected_orders, "
    "orders_ledger (the rows of batch_ledger of stream orders) or marts), cause and campaign, with what the recount expects and "
    "what was found. An hour without a difference has one row with cause 'none'. event_hour null: records without a readable time",
    columns="""
        run_id STRING, event_hour TIMESTAMP, layer STRING, cause STRING, campaign_id STRING,
        rows_different BIGINT, rows_expected BIGINT, rows_found BIGINT, nanos_expected DECIMAL(38,0), nanos_found DECIMAL(38,0),
        is_repaired BOOLEAN, detail STRING, delta_versions STRING, run_at TIMESTAMP
    """,
    key=("run_id", "event_hour", "layer", "cause", "campaign_id"),
    stats_columns=("event_hour", "run_at"),
)

RESTATEMENTS = Table(
    name="restatements",
    grain="what a correction changed, as differences (after - before): one row a run, hour, region, campaign, currency and "
    "cause; kind is 'repair', 'backfill' or 'review' (invalid traffic). rule_set is the hash of the rules that the "
    "hour was judged by from then on",
    columns="""
        run_id STRING, kind STRING, reason STRING, cause STRING, event_hour TIMESTAMP, region STRING, campaign_id STRING,
        currency STRING, impressions BIGINT, clicks BIGINT, invalid_impressions BIGINT, invalid_clicks BIGINT,
        spend_nanos DECIMAL(38,0), invalid_spend_nanos DECIMAL(38,0), rule_set STRING, restated_at TIMESTAMP
    """,
    key=("run_id", "event_hour", "region", "campaign_id", "currency", "cause"),
    stats_columns=("event_hour", "restated_at"),
)

HOUR_RULES = Table(
    name="hour_rules",
    grain="one row a backfill run and hour: the rules by which the hour's records are judged in place of those of their "
    "batches, for batches up to version events_version of events; later ones by their own. Of several rows the latest "
    "set_at holds",
    columns="""
        run_id STRING, event_hour TIMESTAMP, campaigns_version BIGINT, earliest_us BIGINT, future_skew_us BIGINT,
        hour_grace_us BIGINT, events_version BIGINT, rule_set STRING, set_at TIMESTAMP
    """,
    key=("run_id", "event_hour"),
    stats_columns=("event_hour", "set_at"),
)

HOUR_CLOSINGS = Table(
    name="hour_closings",
    grain="one row an operator's decision to close all hours that end at or before closed_through, whatever a silent source says. "
    "The rows are hash-chained",
    columns=f"closed_through TIMESTAMP, reason STRING, closed_by STRING, closed_at TIMESTAMP, {_CHAIN}",
    key=("closed_at",),
    stats_columns=("closed_through",),
)

RULE_SETS = Table(
    name="rule_sets",
    grain="one row a rule set that was ever used: kind ('invalid_traffic' or 'attribution'), its content as canonical JSON, and "
    "rule_set, the SHA-256 of kind and content",
    columns="rule_set STRING, kind STRING, content STRING, set_at TIMESTAMP",
    key=("rule_set",),
    stats_columns=("set_at",),
)

TRAFFIC_REVIEWS = Table(
    name="traffic_reviews",
    grain="one row a review of an hour's events for invalid traffic: by which rule_set all events of the hour up to version "
    "events_version of `events` are judged, and over how many accepted events (inputs: those of the hour and of the "
    "hours before that its rules look back to). Of several rows of an hour the latest reviewed_at holds",
    columns="""
        run_id STRING, event_hour TIMESTAMP, rule_set STRING, events_version BIGINT, inputs BIGINT, events BIGINT, invalid BIGINT,
        changed BIGINT, reviewed_at TIMESTAMP
    """,
    key=("run_id", "event_hour"),
    stats_columns=("event_hour", "reviewed_at"),
)

ATTRIBUTED_ORDERS = Table(
    name="attributed_orders",
    grain="append-only: one row an order, revision and touch; the highest revision of an order holds. An order without a "
    "touch, or cancelled, has one row whose touch columns are null, so that it replaces what stood before. Per model "
    "two lists over window_days: credited micros (they sum to total_micros over the touches of a window) and weights "
    "(they sum to 1); null where the touch lies outside the window",
    columns="""
        order_id STRING, revision BIGINT, status STRING, order_time TIMESTAMP, user_id STRING, store_id STRING, currency STRING,
        total_micros BIGINT, touch_event_id STRING, touch_type STRING, touch_time TIMESTAMP, campaign_id STRING, ad_id STRING,
        touches BIGINT, window_days ARRAY<BIGINT>,
        last_click_micros ARRAY<BIGINT>, first_click_micros ARRAY<BIGINT>, linear_micros ARRAY<BIGINT>,
        position_based_micros ARRAY<BIGINT>, time_decay_micros ARRAY<BIGINT>,
        last_click_weights ARRAY<DOUBLE>, first_click_weights ARRAY<DOUBLE>, linear_weights ARRAY<DOUBLE>,
        position_based_weights ARRAY<DOUBLE>, time_decay_weights ARRAY<DOUBLE>,
        reason STRING, rule_set STRING, attributed_at TIMESTAMP, _run_id STRING
    """,
    key=("order_id", "revision", "touch_event_id"),
    stats_columns=("order_id", "order_time", "revision"),
)

BILLING_LINES = Table(
    name="billing_lines",
    grain="append-only: one row a line of the billing ledger. line_type 'charge' (the day closed), 'credit' (less than "
    "billed) or 'adjustment' (more); the amounts of a day, campaign, store and currency sum to its spend, rounded "
    "once, half away from zero. The measures are the day's totals after the line; posting numbers the commits of lines. "
    "spend_parts (JSON) is the spend in nanos by what it came from: the batches' own increments and each correction run's. "
    "The rows are hash-chained",
    columns=f"""
        line_id STRING, line_type STRING, event_date DATE, campaign_id STRING, store_id STRING, currency STRING,
        amount_micros DECIMAL(38,0), billed_micros DECIMAL(38,0), spend_nanos DECIMAL(38,0), impressions BIGINT, clicks BIGINT,
        invalid_impressions BIGINT, invalid_clicks BIGINT, invalid_spend_nanos DECIMAL(38,0),
        reason STRING, run_id STRING, rule_set STRING, metrics_version BIGINT, posting BIGINT, spend_parts STRING,
        billed_at TIMESTAMP, {_CHAIN}
    """,
    key=("line_id",),
    stats_columns=("event_date", "billed_at"),
)

ERASURES = Table(
    name="erasures",
    grain="what erasures did; never an id. kind 'file': one row a landing file that a run (erasure_id) replaced, with its state "
    "before and after: SHA-256, size and time of modification. kind 'receipt': one row an erased person: person is the HMAC of "
    "the id under the key of the suppression list, detail (JSON) has the counts, the versions and the proof",
    columns="""
        erasure_id STRING, kind STRING, source_file STRING, old_sha256 STRING, new_sha256 STRING, old_size_bytes BIGINT,
        new_size_bytes BIGINT, old_modified_ms BIGINT, new_modified_ms BIGINT, person STRING, detail STRING,
        requested_at TIMESTAMP, erased_at TIMESTAMP
    """,
    key=("erasure_id", "kind", "source_file", "person"),
    stats_columns=("erased_at",),
)

AUDIT_LOG = Table(
    name="audit_log",
    grain="append-only: one row an act of a person or schedule that changed what is counted, closed, kept or forgotten: who (user, "
    "host, command, run_id), which act, why (reason, arguments as JSON), when, and the table and version that it made. "
    "The rows are hash-chained",
    columns=f"""
        entry_id STRING, act STRING, user_name STRING, host STRING, command STRING, run_id STRING, reason STRING, arguments STRING,
        table_name STRING, table_version BIGINT, acted_at TIMESTAMP, {_CHAIN}
    """,
    key=("entry_id",),
    stats_columns=("acted_at",),
)

PUBLICATIONS = Table(
    name="publications",
    grain="for people; Kafka itself knows what was published. One row a table, topic and time of writing: versions of the table "
    "from first_version up to version are published, with so many records (null: the publisher ended before it told), and "
    "total_records ever. table_id is the table's own: one that was deleted and made anew has another",
    columns="""
        cluster STRING, topic STRING, table_name STRING, table_id STRING, first_version BIGINT, version BIGINT,
        records BIGINT, total_records BIGINT, published_at TIMESTAMP
    """,
    key=("topic", "table_id", "version"),
    stats_columns=("version", "published_at"),
)

BATCH_TABLES = (EVENTS, REJECTED_EVENTS, MINUTE_METRICS, BATCH_LEDGER, ORDERS, REJECTED_ORDERS)
"""The tables that the batches of records write. A recount can restore their rows from the raw input."""
_INPUT_TABLES = (CAMPAIGNS, NAMES, RAW_EVENTS, RAW_ORDERS, SOURCE_GAPS, RELEASES, RAW_RETIREMENTS)
_CORRECTION_TABLES = (RECONCILIATIONS, RESTATEMENTS, HOUR_RULES, HOUR_CLOSINGS, ERASURES, AUDIT_LOG)
_SETTLEMENT_TABLES = (RULE_SETS, TRAFFIC_REVIEWS, ATTRIBUTED_ORDERS, BILLING_LINES, PUBLICATIONS)
TABLES = {table.name: table for table in (*BATCH_TABLES, *_INPUT_TABLES, *_CORRECTION_TABLES, *_SETTLEMENT_TABLES)}
