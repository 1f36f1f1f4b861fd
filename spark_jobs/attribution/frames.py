"""Attribution as a pure function of two tables. The result has a row per order, model, window and credited touch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.attribution.credits import credit
from spark_jobs.attribution.rules import MODELS, AttributionRules
from spark_jobs.lake.duck import task_connection
from spark_jobs.rules.exempt import are_exempt

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_TIME = pa.timestamp("us", "UTC")
CREDITS = pa.schema(
    {
        "order_id": pa.string(),
        "model": pa.string(),
        "window_days": pa.int64(),
        "touch_event_id": pa.string(),
        "campaign_id": pa.string(),
        "ad_id": pa.string(),
        "touch_time": _TIME,
        "order_time": _TIME,
        "credit_weight": pa.float64(),
        "credit_micros": pa.int64(),
        "currency": pa.string(),
    }
)
_SPARK_TYPES = {pa.string(): "STRING", pa.int64(): "BIGINT", pa.float64(): "DOUBLE", _TIME: "TIMESTAMP"}
_ORDER_COLUMNS = ("order_id", "user_id", "store_id", "order_time", "total_micros", "currency")
_TOUCH_COLUMNS = ("event_id", "event_type", "user_id", "store_id", "event_time", "campaign_id", "ad_id")
_BUCKETS = 64


def attribute(orders: DataFrame, touches: DataFrame, rules: AttributionRules | None = None) -> DataFrame:
    """Credit ``orders`` to ``touches``, both Spark DataFrames, without reading or writing a table.

    - Orders have order_id, user_id, store_id, order_time, total_micros, currency. With a column ``status`` only placed ones count.
    - Touches have event_id, event_type (click or impression), user_id, store_id, event_time, campaign_id, ad_id. With a column
      ``invalid_traffic_rule`` only touches without a rule count.
    - The result has the columns CREDITS and a row per touch with a weight. The weights of an order, model and window sum to 1, the
      micros to total_micros. Orders without a touch, and orders of exempt users, have no row.
    """
    from pyspark.sql import functions as f

    chosen = rules or AttributionRules()
    if "status" in orders.columns:
        orders = orders.where("status = 'placed'")
    if "invalid_traffic_rule" in touches.columns:
        touches = touches.where("invalid_traffic_rule is null")
    bucket = f.pmod(f.xxhash64("user_id", "store_id"), f.lit(_BUCKETS)).alias("bucket")
    left = orders.select(*_ORDER_COLUMNS).groupBy(bucket)
    right = touches.select(*_TOUCH_COLUMNS).groupBy(bucket)
    columns = ", ".join(f"{field.name} {_SPARK_TYPES[field.type]}" for field in CREDITS)
    return left.cogroup(right).applyInArrow(
        lambda of, to: credit_orders(of, to, chosen) if of.num_rows else CREDITS.empty_table(), columns
    )


def credit_orders(orders: pa.Table, touches: pa.Table, rules: AttributionRules | None = None) -> pa.Table:
    """Do as `attribute`, from Arrow tables to a table of schema CREDITS."""
    chosen = rules or AttributionRules()
    if "status" in orders.column_names:
        orders = orders.filter(pc.equal(orders["status"], "placed"))
    if "invalid_traffic_rule" in touches.column_names:
        touches = touches.filter(pc.is_null(touches["invalid_traffic_rule"]))
    orders = orders.filter(pc.invert(are_exempt(orders["user_id"], chosen.exempt_users)))
    numbered = orders.select(_ORDER_COLUMNS).append_column("number", pa.array(np.arange(orders.num_rows)))
    with task_connection().cursor() as own:
        own.register("orders", numbered)
        own.register("touches", touches.select(_TOUCH_COLUMNS))
        found = own.execute(
            f"""
            select number, event_id, event_type = 'click' as is_click, campaign_id, ad_id, epoch_us(event_time) as touch_us
            from orders join touches using (user_id, store_id)
            where epoch_us(event_time) < epoch_us(order_time)
                and epoch_us(event_time) >= epoch_us(order_time) - {chosen.lookback_us}
            order by number, touch_us, event_id
            """
        ).to_arrow_table()
    order = found["number"].to_numpy()
    is_click = found["is_click"].to_numpy()
    times = orders["order_time"].cast(_TIME).cast(pa.int64()).to_numpy()
    made = credit(times, orders["total_micros"].to_numpy(), order, found["touch_us"].to_numpy(), is_click, chosen)
    weights, micros = (np.stack([of_model[model] for model in MODELS]) for of_model in (made.weights, made.micros))
    model, at, window = np.nonzero(weights > 0)
    touch, of = found.take(pa.array(at)), orders.take(pa.array(order[at]))
    columns = {
        "order_id": of["order_id"],
        "model": pa.array(MODELS).take(pa.array(model)),
        "window_days": pa.array(chosen.window_days, pa.int64()).take(pa.array(window)),
        "touch_event_id": touch["event_id"],
        "campaign_id": touch["campaign_id"],
        "ad_id": touch["ad_id"],
        "touch_time": touch["touch_us"].cast(_TIME),
        "order_time": of["order_time"],
        "credit_weight": pa.array(weights[model, at, window]),
        "credit_micros": pa.array(micros[model, at, window]),
        "currency": of["currency"],
    }
    return pa.table([columns[field.name].cast(field.type) for field in CREDITS], schema=CREDITS)
