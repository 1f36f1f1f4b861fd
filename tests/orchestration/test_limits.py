"""One home with records at every edge of the contract: times at both ends of their range, amounts as high as they may be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import lake
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from local import LocalEvents, LocalOrders

from orchestration.explain.billing import explain_billing_line
from orchestration.explain.campaign_day import explain_campaign_day
from orchestration.explain.credits import explain_credit
from orchestration.explain.node import as_json
from orchestration.marts import build_marts, query_marts
from orchestration.marts.render import render
from spark_jobs.attribution.job import attribute
from spark_jobs.audit.compare import Difference
from spark_jobs.billing.job import BillingLine, bill
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.backfill import backfill
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.lake.duck import connect_delta
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.compact import compact
from spark_jobs.operate.status import Status, read_status
from spark_jobs.operate.watermark import close_by_hand, read_closing
from spark_jobs.traffic.review import review
from spark_jobs.units import HourRange

pytestmark = pytest.mark.homes

FIRST = "1970-01-01T00:00:00Z"  # the earliest that ADTALLY_EARLIEST_EVENT_TIME can be
LAST = "9999-12-31T23:59:59.999999Z"
YEAR_1 = "0001-01-01T00:00:00Z"
MANY = 9_300  # clicks at the highest price, 10^15 nanos each, or orders of the highest total: their sum needs more than 64 bits
DEAR_NANOS = MANY * 10**15
BEYOND = 9_300_007 * 10**15
MOST_OF_ONE = 9_000 * 10**15
DEAR = "c-dear,s-1,cpc,1000000000000000000,IRR,2000-01-01T00:00:00Z,"


def edge_events() -> list[dict[str, Any]]:
    """One event an edge: its id says what becomes of it."""
    clicks = {"event_type": "click", "campaign_id": "c-edge", "price_micros": 0}
    made = [
        lake.event("accepted-first", **clicks, event_time=FIRST, received_at=FIRST),
        lake.event("accepted-last", **clicks, event_time=LAST, received_at=LAST),
        lake.event("accepted-last-hour", **clicks, event_time="9999-12-31T23:00:00Z", received_at="9999-12-31T23:00:00Z"),
        lake.event("accepted-received-last", **clicks, received_at=LAST),
        lake.event("accepted-ahead", **clicks, event_time=LAST, received_at="9999-12-31T23:55:00Z"),
        lake.event("rejected-before-first", **clicks, event_time="1969-12-31T23:59:59.999999Z"),
        lake.event("rejected-year-1", **clicks, event_time=YEAR_1, received_at=YEAR_1),
        lake.event("rejected-received-year-1", **clicks, received_at=YEAR_1),
        lake.event("rejected-beyond", **clicks, event_time="9999-12-31T23:59:59.999999-00:01", received_at=LAST),
        lake.event("rejected-before-year-1", **clicks, event_time="0001-01-01T00:00:00+00:01"),
    ]
    return [{**record, "user_id": f"u-{record['event_id']}"} for record in made]  # or some would be repeats


def edge_orders() -> list[dict[str, Any]]:
    return [
        lake.order("accepted-first", order_time=FIRST, received_at=FIRST),
        lake.order("accepted-last", order_time=LAST, received_at=LAST),
        lake.order("accepted-last", order_time=LAST, received_at=LAST, status="cancelled"),
        lake.order("accepted-received-last", received_at=LAST),
        lake.order("rejected-before-first", order_time="1969-12-31T23:59:59.999999Z"),
        lake.order("rejected-year-1", order_time=YEAR_1, received_at=YEAR_1),
    ]


def dear_clicks(name: str, second: int, **changes: Any) -> list[dict[str, Any]]:
    """So many clicks of one minute, each at the contract's highest price, that 64 bits do not hold what they cost."""
    minute = {"event_time": f"2025-06-02T10:{second:02d}:07Z", "received_at": f"2025-06-02T10:{second:02d}:09Z"}
    price = {"campaign_id": "c-dear", "event_type": "click", "price_micros": 10**12, "currency": "IRR"}
    return [lake.event(f"{name}-{n}", **{"user_id": f"{name}-{n}", **minute, **price, **changes}) for n in range(MANY)]


@dataclass(frozen=True)
class Home:
    """A home with all done that is done with one, and what was found on the way."""

    settings: Settings
    differences: list[Difference]
    nanos_recounted: int
    status: Status
    lines: list[BillingLine]


def write_beyond(settings: Settings) -> None:
    """A day that came to more than 64 bits of micros: by the million clicks, so what they make is written into the tables."""
    moment = datetime(2025, 6, 1, 12, tzinfo=UTC)
    common = {
        "region": "us",
        "campaign_id": "c-dear",
        "ad_id": "a-1",
        "store_id": "s-1",
        "currency": "IRR",
        "event_date": moment.date(),
    }
    common |= {"_query_id": "beyond", "_batch_id": 0}
    whole, rest = divmod(2 * BEYOND, MOST_OF_ONE)  # what one event comes to is a BIGINT
    shares = [*[MOST_OF_ONE] * whole, rest]
    increment = {"event_minute": moment, "impressions": 1, "invalid_impressions": 0}
    increment |= {"spend_nanos": BEYOND, "invalid_spend_nanos": BEYOND}
    clicks = (len(shares) // 2, len(shares) - len(shares) // 2)  # as many billable ones as invalid ones
    event = {"event_time": moment, "received_at": moment, "ingested_at": moment, "event_hour": 12, "is_late": False}
    event |= {"price_micros": 0}
    kinds: list[tuple[str, str | None, int, int]] = [("impression", None, 0, 0)] * 2
    kinds += [("click", None, share, 0) for share in shares]
    kinds += [("click", "repeat_click", 0, share) for share in shares]
    booked = {"stream": "events", "source": "files", "region": "us", "event_hour": moment, "ingested_at": moment}
    booked |= {
        "offered": len(kinds),
        "accepted": len(kinds),
        "duplicate": 0,
        "conflict": 0,
        "rejected": 0,
        "late": 0,
        "invalid_traffic": len(shares),
        "unpriced": 0,
    }
    for table, rows in (
        (
            EVENTS,
            [
                common
                | event
                | {"event_id": f"b-{n}", "event_type": kind, "invalid_traffic_rule": rule}
                | {"spend_nanos": net, "invalid_spend_nanos": invalid}
                for n, (kind, rule, net, invalid) in enumerate(kinds)
            ],
        ),
        (
            MINUTE_METRICS,
            [
                common | increment | {"record_uuid": f"b-{n}", "clicks": part, "invalid_clicks": part}
                for n, part in enumerate(clicks)
            ],
        ),
        (BATCH_LEDGER, [booked | {"_query_id": "beyond", "_batch_id": 0, "spend_nanos": 2 * BEYOND, "max_received_at": moment}]),
    ):
        write_deltalake(settings.table_uri(table.name), pa.Table.from_pylist(rows, table.schema), mode="append")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    settings = load_settings(home=tmp_path_factory.mktemp("limits"), earliest_event_time="1970-01-01T00:00:00Z")
    lake.campaigns(
        settings,
        DEAR,
        f"c-edge,s-1,cpc,1,EUR,{YEAR_1},{LAST}",
        f"c-gone,s-1,cpc,1,EUR,{YEAR_1},2000-01-01T00:00:00Z",
    )
    clicks = [
        *dear_clicks("billable", 0),
        *dear_clicks("crawler", 1, user_agent="Mozilla/5.0 (compatible; Googlebot/2.1)"),  # found at ingest
        *dear_clicks("robot", 2, user_id="robot"),  # found by the review
        lake.event("bought", event_type="click", campaign_id="c-dear", user_id="buyer", currency="IRR", price_micros=0),
    ]
    orders = [lake.order(f"o-{n}", user_id="buyer", total_micros=10**15, currency="IRR") for n in range(MANY)]
    ensure_tables(settings)
    events = LocalEvents(settings)
    events.take(clicks, "us")
    events.take(edge_events(), "us")
    LocalOrders(settings, "local-orders").take([*orders, *edge_orders()], "us")
    close_by_hand(settings, datetime(2025, 6, 3, tzinfo=UTC), reason="test", closed_by="test")
    review(settings)
    attribute(settings)
    compact(settings, None)
    found, status = reconcile(settings, None), read_status(settings)
    write_beyond(settings)
    lines = bill(settings).lines
    return Home(settings, found.differences, sum(hour.nanos_found for hour in found.hours), status, lines)


@pytest.fixture(scope="module")
def built(home: Home) -> Home:
    """The same, with its marts."""
    build_marts(home.settings)
    return home


def ids(settings: Settings, table: str, column: str) -> list[str]:
    with connect_delta() as connection:
        found = connection.sql(f"select {column} from delta_scan('{settings.table_uri(table)}') order by 1").fetchall()
    return [value for (value,) in found]


def sums(settings: Settings, table: str, *columns: str, where: str = "true") -> tuple[int, ...]:
    with connect_delta() as connection:
        chosen = ", ".join(f"sum({column})" for column in columns)
        found = connection.sql(f"select {chosen} from delta_scan('{settings.table_uri(table)}') where {where}").fetchall()
    return tuple(int(value) for value in found[0])


def test_times_at_their_edges(home: Home) -> None:
    settings = home.settings
    accepted = [one for one in ids(settings, "events", "event_id") if one.startswith(("accepted", "rejected"))]
    assert accepted == sorted(e["event_id"] for e in edge_events() if e["event_id"].startswith("accepted"))
    assert ids(settings, "rejected_events", "record_id") == sorted(
        e["event_id"] for e in edge_events() if e["event_id"].startswith("rejected")
    )
    assert {one for one in ids(settings, "orders", "order_id") if not one.startswith("o-")} == {
        o["order_id"] for o in edge_orders() if o["order_id"].startswith("accepted")
    }
    assert home.status.conservation_holds
    assert not home.differences
    assert read_closing(settings).first_hour == datetime(1970, 1, 1, tzinfo=UTC)


def test_money_over_64_bits_in_the_tables(home: Home) -> None:
    settings = home.settings
    day = "event_date = '2025-06-02' and campaign_id = 'c-dear'"
    assert DEAR_NANOS > 2**63
    assert sums(settings, "minute_metrics", "spend_nanos", "invalid_spend_nanos", where=day) == (DEAR_NANOS, 2 * DEAR_NANOS)
    own, reviewed = ("_run_id is null", "_run_id is not null")
    hour = "event_hour = timestamptz '2025-06-02 10:00:00Z' and "
    assert sums(settings, "batch_ledger", "spend_nanos", where=hour + own) == (2 * DEAR_NANOS,)
    assert sums(settings, "batch_ledger", "spend_nanos", where=hour + reviewed) == (-DEAR_NANOS,)
    assert sums(settings, "restatements", "spend_nanos", "invalid_spend_nanos") == (-DEAR_NANOS, DEAR_NANOS)
    assert home.status.problems == []
    assert home.nanos_recounted == DEAR_NANOS
    charged = {line.event_date.day: (line.amount_micros, line.invalid_spend_nanos) for line in home.lines if line.currency == "IRR"}
    assert charged == {1: (2 * BEYOND // 1000, 2 * BEYOND), 2: (DEAR_NANOS // 1000, 2 * DEAR_NANOS)}
    assert sums(settings, "billing_lines", "amount_micros", where="currency = 'IRR'") == ((2 * BEYOND + DEAR_NANOS) // 1000,)


MARTS = {
    "select spend_nanos, spend_micros, invalid_spend_nanos from fct_campaign_day": [
        (2 * BEYOND, 2 * BEYOND // 1000, 2 * BEYOND),
        (DEAR_NANOS, DEAR_NANOS // 1000, 2 * DEAR_NANOS),
    ],
    "select max(spend_nanos), max(invalid_spend_nanos), max(gross_spend_micros) from fct_campaign_minute group by event_date": [
        (2 * BEYOND, 2 * BEYOND, 4 * BEYOND // 1000),
        (DEAR_NANOS, DEAR_NANOS, DEAR_NANOS // 1000),
    ],
    "select distinct sum(invalid_spend_nanos) from fct_invalid_traffic_sources group by event_date, source_type": [
        (2 * BEYOND,),
        (2 * DEAR_NANOS,),
    ],
    "select distinct sum(spend_nanos), sum(gross_spend_micros) from fct_invalid_traffic_day group by event_date": [
        (2 * BEYOND, 4 * BEYOND // 1000),
        (DEAR_NANOS, 3 * DEAR_NANOS // 1000),
    ],
    "select max(spent_micros), max(overspend_micros) from fct_budget_pacing group by event_date": [
        (2 * BEYOND // 1000, 2 * BEYOND // 1000 - 10**18),
        (DEAR_NANOS // 1000, 0),
    ],
    "select amount_micros, billed_micros from fct_billing_ledger": [
        (2 * BEYOND // 1000, 2 * BEYOND // 1000),
        (DEAR_NANOS // 1000, DEAR_NANOS // 1000),
    ],
    "select distinct spend_nanos, cpm_micros, gross_spend_micros from fct_advertiser_performance": [
        (2 * BEYOND, BEYOND, 4 * BEYOND // 1000),
        (DEAR_NANOS, None, 3 * DEAR_NANOS // 1000),
    ],
    "select distinct revenue_by_touch_date_micros, revenue_by_order_date_micros from fct_advertiser_attribution": [
        (MANY * 10**15, MANY * 10**15)
    ],
    "select distinct sum(credit_micros) from fct_attribution_credits group by model, window_days": [(MANY * 10**15,)],
    "select sum(spend_nanos), max(spend_micros_before), min(spend_micros_after) from fct_restatements group by kind": [
        (-DEAR_NANOS, 2 * DEAR_NANOS // 1000, DEAR_NANOS // 1000)
    ],
}


def test_days_at_the_edges_in_the_marts(built: Home) -> None:
    days = query_marts(
        built.settings, "select event_date::varchar, clicks from fct_campaign_day where campaign_id = 'c-edge' order by 1"
    )[1]
    assert days == [("1970-01-01", 1), ("2025-06-02", 1), ("9999-12-31", 3)]


@pytest.mark.parametrize("sql", MARTS)
def test_money_over_64_bits_in_the_marts(built: Home, sql: str) -> None:
    chosen = sql.replace(" group by", " where currency = 'IRR' group by") if " group by" in sql else f"{sql} where currency = 'IRR'"
    assert query_marts(built.settings, f"{chosen} order by 1 desc")[1] == MARTS[sql]


def test_what_a_query_prints_has_all_digits(built: Home) -> None:
    columns, rows = query_marts(
        built.settings,
        "select spend_nanos, sum(spend_nanos) over () as all_nanos from fct_campaign_day where currency = 'IRR' order by 1",
    )
    assert render(columns, rows, "csv").splitlines()[1] == f"{DEAR_NANOS},{2 * BEYOND + DEAR_NANOS}"
    assert json.loads(render(columns, rows, "json"))[0] == {"spend_nanos": DEAR_NANOS, "all_nanos": 2 * BEYOND + DEAR_NANOS}


def test_explain_adds_up(built: Home) -> None:
    day = explain_campaign_day(built.settings, "c-dear", date(2025, 6, 2))
    assert not list(day.all_problems())
    assert f'"spend_nanos": {DEAR_NANOS}' in json.dumps(as_json(day), default=str)
    assert not list(explain_credit(built.settings, "o-0").all_problems())
    (line,) = (line for line in built.lines if line.event_date == date(2025, 6, 2) and line.currency == "IRR")
    assert not list(explain_billing_line(built.settings, line.line_id).all_problems())


def test_a_lost_increment_is_put_back_whole(home: Home) -> None:
    """Behind all that reads the home as it was."""
    settings, hours = home.settings, HourRange(datetime(2025, 6, 2, 10, tzinfo=UTC), datetime(2025, 6, 2, 11, tzinfo=UTC))
    DeltaTable(settings.table_uri("minute_metrics")).delete("event_date = '2025-06-02' and spend_nanos > 0")
    lost = reconcile(settings, hours, repair=True).differences
    assert [(one.cause, one.nanos_expected - one.nanos_found, one.is_repaired) for one in lost] == [
        ("increment_altered", DEAR_NANOS, True),  # of the robot's minute the review's own row is still there
        ("increment_missing", DEAR_NANOS, True),
    ]
    assert not reconcile(settings, hours).differences

    lake.campaigns(settings, DEAR.replace("cpc", "cpm"))  # so that a click costs nothing
    report = backfill(settings, hours)
    assert (DEAR_NANOS, 0) in [(change.spend_nanos_before, change.spend_nanos_after) for change in report.changes]
    day = "event_date = '2025-06-02' and campaign_id = 'c-dear'"
    assert sums(settings, "minute_metrics", "spend_nanos", "invalid_spend_nanos", where=day) == (0, 0)
    assert sums(settings, "restatements", "spend_nanos", "invalid_spend_nanos", where="kind = 'backfill'") == (
        -DEAR_NANOS,
        -2 * DEAR_NANOS,
    )
    assert not reconcile(settings, hours).differences
