"""What attribution costs: new orders against clicks that are there, all models and windows, and how it grows with history.

    python -m benchmarks.attribution                                            100,000 orders, 0.5 M, 2 M and 8 M clicks of 30 days
    python -m benchmarks.attribution --orders 400 --histories 2000 8000         does it work at all?

Each history has the same orders of the last hour and the same half million clicks before them (5 an order on average, one with
nine hundred); the rest are clicks of other users, on the same 30 days. First the clicks are indexed, then orders come in
batches, each followed by an attribution: what those take is the figure, per second of CPU time (which other work on the machine
disturbs less) and of wall time. Then clicks come that orders lie behind. Credits are held to those of a join in DuckDB.
Results go to benchmarks/results/attribution.json. Exit status 1: a credit is wrong or, with --check, the target was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks.measure import BenchmarkError, machine, note, only_one, verdict, write_result
from benchmarks.run import common_options
from spark_jobs.attribution.job import AttributionReport, attribute
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.duck import connect_delta
from spark_jobs.lake.tables import EVENTS, ORDERS
from spark_jobs.lake.writes import DeltaSink, ensure_tables
from spark_jobs.steps import Step
from spark_jobs.units import DAY_US

PEER_ORDERS_PER_SECOND = 20_000  # a core: Nexmark q20, a join, on Flink makes 19 k events/s per core
END = int(datetime(2025, 7, 1, tzinfo=UTC).timestamp() * 1_000_000)
HOUR_US = DAY_US // 24
STORES = 997
_WRITE_ROWS = 500_000


@dataclass(frozen=True)
class Taken:
    """What a step took."""

    wall_seconds: float
    cpu_seconds: float


class Watch:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._from = (time.perf_counter(), time.process_time())

    def taken(self) -> Taken:
        return Taken(round(time.perf_counter() - self._from[0], 3), round(time.process_time() - self._from[1], 3))


class Bench:
    """One history: a home of its own, and the steps on it."""

    def __init__(self, args: argparse.Namespace, clicks: int) -> None:
        self.args, self.clicks = args, clicks
        self.generator = np.random.default_rng(args.seed)
        self.home: Settings = load_settings(home=Path(args.work).absolute() / "attribution" / str(clicks))
        shutil.rmtree(self.home.home_path, ignore_errors=True)
        ensure_tables(self.home)
        self.wrong: list[str] = []

    def run(self) -> dict[str, Any]:
        """All steps; their figures."""
        args = self.args
        near = min(self.clicks, args.touches * args.orders)
        owners = np.minimum(self.generator.zipf(1.6, near) - 1 + self.generator.integers(0, args.orders, near), args.orders - 1)
        spread = self.generator.integers(0, 30 * DAY_US - 2 * HOUR_US, near)
        late = self.generator.random(near) < 0.02
        self._events("near", owners[~late], END - HOUR_US - 1 - spread[~late])
        far = self.clicks - near
        self._events(
            "far",
            args.orders + self.generator.integers(0, max(1, far // 3), far),
            END - 1 - self.generator.integers(0, 30 * DAY_US, far),
        )
        note(f"{self.clicks:,} clicks: indexing")
        indexing, _ = self._attribute()
        batches = []
        step = -(-args.orders // args.batches)
        for start in range(0, args.orders, step):
            self._orders(start, min(start + step, args.orders))
            taken, report = self._attribute()
            batches.append({"orders": report.orders, "touches": report.touches, **asdict(taken)})
        note(f"{self.clicks:,} clicks: late ones")
        self._events("late", owners[late], END - HOUR_US - 1 - spread[late])
        taken, report = self._attribute()
        again, nothing = self._attribute()
        if nothing.orders:
            self.wrong.append(f"{nothing.orders} orders are looked at again though nothing came")
        self._check(np.bincount(owners, minlength=args.orders))
        orders = sum(batch["orders"] for batch in batches)
        cpu, wall = (max(sum(batch[name] for batch in batches), 0.001) for name in ("cpu_seconds", "wall_seconds"))
        result = {
            "clicks": self.clicks,
            "orders": orders,
            "touches": sum(batch["touches"] for batch in batches),
            "orders_per_cpu_second": round(orders / cpu),
            "orders_per_second": round(orders / wall),
            "touches_per_cpu_second": round(sum(batch["touches"] for batch in batches) / cpu),
            "indexing": asdict(indexing),
            "batches": batches,
            "late": {"clicks": int(late.sum()), "orders": report.orders, "revisions": report.revisions, **asdict(taken)},
            "nothing_new": asdict(again),
            "wrong": self.wrong,
        }
        shutil.rmtree(self.home.home_path, ignore_errors=True)
        return result

    def _attribute(self) -> tuple[Taken, AttributionReport]:
        watch = Watch()
        report = attribute(self.home)
        return watch.taken(), report

    def _events(self, name: str, owners: Any, times: Any) -> None:
        """Clicks in the order of their time, some hundred thousand a commit."""
        by = np.argsort(times, kind="stable")
        for number, part in enumerate(_slices(by)):
            owner, time_us = owners[part], times[part]
            columns = {
                "event_id": pa.array([f"{name}-{at:09d}" for at in part.tolist()]),
                "event_type": pa.repeat("click", len(part)),
                "event_time": pa.array(time_us).cast(pa.timestamp("us", "UTC")),
                "received_at": pa.array(time_us).cast(pa.timestamp("us", "UTC")),
                "campaign_id": pa.array([f"c{at}" for at in (part % 1000).tolist()]),
                "ad_id": pa.array([f"a{at}" for at in (part % 10_000).tolist()]),
                "user_id": pa.array([f"user-{at:08d}" for at in owner.tolist()]),
                "store_id": pa.array([f"store-{at:04d}" for at in (owner % STORES).tolist()]),
                "event_date": pa.array((time_us // DAY_US).astype(np.int32)).cast(pa.date32()),
                "event_hour": pa.array((time_us % DAY_US // HOUR_US).astype(np.int32)),
            }
            self._append(EVENTS, columns, Step.EVENTS, f"{name}-{number}")

    def _orders(self, start: int, end: int) -> None:
        owner = np.arange(start, end)
        at = pa.array(END - HOUR_US + owner % 3_600_000 * 1000).cast(pa.timestamp("us", "UTC"))
        columns = {
            "order_id": pa.array([f"order-{number:08d}" for number in owner.tolist()]),
            "order_time": at,
            "received_at": at,
            "user_id": pa.array([f"user-{number:08d}" for number in owner.tolist()]),
            "store_id": pa.array([f"store-{number:04d}" for number in (owner % STORES).tolist()]),
            "total_micros": pa.array(10_000_000 + owner * 7_919 % 90_000_000),
            "currency": pa.repeat("EUR", len(owner)),
            "status": pa.repeat("placed", len(owner)),
        }
        self._append(ORDERS, columns, Step.ORDERS, f"orders-{start}")

    def _append(self, table: Any, columns: dict[str, Any], step: Step, name: str) -> None:
        rows = len(next(iter(columns.values())))
        whole = [columns[f.name].cast(f.type) if f.name in columns else pa.nulls(rows, f.type) for f in table.schema]
        DeltaSink(table, self.home).append_rows(pa.table(whole, schema=table.schema), step, Transaction(name, 0))

    def _check(self, touches: Any) -> None:
        """Sums of every order, model and window, and last, first and linear of 7 days against a join."""
        uri = {name: self.home.table_uri(name) for name in ("events", "orders", "attributed_orders")}
        models = ("last_click", "first_click", "linear", "position_based", "time_decay")
        sums = ", ".join(f"sum(list_extract({model}_micros, w)) as {model}" for model in models)
        with connect_delta({"memory_limit": "2GB"}) as lake:
            lake.execute(
                f"""create table latest as select * from delta_scan('{uri["attributed_orders"]}')
                qualify revision = max(revision) over (partition by order_id)"""
            )
            found = lake.execute("select count(distinct order_id), count(touch_event_id) from latest").fetchall()[0]
            if found != (self.args.orders, int(touches.sum())):
                self.wrong.append(f"{found} orders and touches, not {(self.args.orders, int(touches.sum()))}")
            unequal = " or ".join(f"{model} <> total" for model in models)
            off = lake.execute(
                f"""select count(*) from (
                    select order_id, w, any_value(total_micros) as total, {sums} from latest, range(1, 6) as windows(w)
                    where touch_event_id is not null group by all
                ) where {unequal}"""
            ).fetchall()[0][0]
            if off:
                self.wrong.append(f"{off} sums of an order and window are not its total")
            differ = lake.execute(
                f"""with pairs as (
                    select order_id, event_id, total_micros,
                        row_number() over (partition by order_id order by event_time, event_id) as place,
                        count(*) over (partition by order_id) as size
                    from delta_scan('{uri["orders"]}') join delta_scan('{uri["events"]}') using (user_id, store_id)
                    where event_time < order_time and event_time >= order_time - interval 7 days
                )
                select count(*) from pairs full join (select * from latest where linear_micros[2] is not null) as made
                on pairs.order_id = made.order_id and event_id = touch_event_id
                where (linear_micros[2], last_click_micros[2], first_click_micros[2]) is distinct from (
                    (pairs.total_micros // size + (place <= pairs.total_micros % size)::int)::bigint,
                    case when place = size then pairs.total_micros else 0 end,
                    case when place = 1 then pairs.total_micros else 0 end
                )"""
            ).fetchall()[0][0]
            if differ:
                self.wrong.append(f"{differ} credits of 7 days are not those of a join")


def _slices(by: Any) -> Iterator[Any]:
    for start in range(0, len(by), _WRITE_ROWS):
        yield by[start : start + _WRITE_ROWS]


def show(document: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table("clicks", "orders/s per core", "orders/s wall", "touches/s per core", "indexing CPU s", "late CPU s")
    for found in document["summary"]:
        figures = (found["clicks"], found["orders_per_cpu_second"], found["orders_per_second"], found["touches_per_cpu_second"])
        seconds = (found["indexing"]["cpu_seconds"], found["late"]["cpu_seconds"])
        table.add_row(*(f"{figure:,}" for figure in figures), *(f"{second:.1f}" for second in seconds))
    console.print(table)
    target = document["targets"][0]
    console.print(f"{target['name']}: {target['value']:,}, at least {target['limit']:,}: {'yes' if target['met'] else 'NO'}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="benchmarks.attribution", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--orders", type=int, default=100_000)
    made.add_argument("--touches", type=int, default=5, help="clicks before an order, on average")
    made.add_argument("--batches", type=int, default=10, help="in which the orders come")
    made.add_argument("--histories", type=int, nargs="+", default=[500_000, 2_000_000, 8_000_000], metavar="CLICKS")
    made.add_argument("--measured", type=int, help="the history that the target is held to; default: 2,000,000 or the last")
    made.add_argument(
        "--at-least", type=int, default=PEER_ORDERS_PER_SECOND, metavar="N", help="target: orders/s per core (default: %(default)s)"
    )
    made.add_argument("--seed", type=int, default=7)
    common_options(made)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it and write the result."""
    args = parser().parse_args(argv)
    work = Path(args.work).absolute() / "attribution"
    work.mkdir(parents=True, exist_ok=True)
    host = machine()
    try:
        with only_one(work):
            summary = [Bench(args, clicks).run() for clicks in args.histories]
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    measured = args.measured or (2_000_000 if 2_000_000 in args.histories else args.histories[-1])
    value = next(found["orders_per_cpu_second"] for found in summary if found["clicks"] == measured)
    target = {"name": f"orders/s per core against {measured:,} clicks", "value": value, "limit": args.at_least}
    document = {
        "scenario": "attribution",
        "machine": host | {"load_average_at_end": round(os.getloadavg()[0], 2)},
        "parameters": {k: v for k, v in vars(args).items() if k not in ("work", "results", "name", "adtally_env", "timeout")},
        "summary": summary,
        "targets": [target | {"met": value >= args.at_least}],
    }
    write_result(args.results, args.name or "attribution", document)
    show(document, Console())
    wrong = [f"{found['clicks']:,} clicks: {problem}" for found in summary for problem in found["wrong"]]
    return verdict(wrong, is_missed=args.check and value < args.at_least)


if __name__ == "__main__":
    raise SystemExit(main())
