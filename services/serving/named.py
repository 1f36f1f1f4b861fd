"""Named queries: what dashboards ask of Pinot (SQL in ``queries/<name>.sql``) and of the marts (``<name>.duckdb.sql``).

Both return the same columns and, for the same data, the same rows, so that the two stores can be compared. SUM of Pinot 0.11 is a
double, as is arithmetic on sums, and loses digits above 2^53. So sums of money are SUMPRECISION, and this module computes ratios
and rounds to micros from whole numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from services.launcher.errors import PinotQueryError, ServiceError, ServiceUsageError
from services.serving.tables import MODELS

if TYPE_CHECKING:
    from services.launcher.pinot import PinotClient

ROW_LIMIT = 50_000
_DAY_MS = 86_400_000
_LONGEST_TEXT = 128
Value = str | int | None
Values = dict[str, Value]
Row = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """``kind``: text (up to 128 characters), day (2025-06-02), whole (a whole number), or model.

    A parameter that has no ``default`` and is not required is optional: without it the query does not filter by it.
    """

    name: str
    kind: str
    meaning: str
    is_required: bool = False
    default: str | None = None


@dataclass(frozen=True)
class NamedQuery:
    """``columns`` are those of its result. ``finish`` makes them from Pinot's rows, the parameters and the time."""

    name: str
    meaning: str
    parameters: tuple[Parameter, ...]
    columns: tuple[str, ...]
    finish: Callable[[list[Row], Values, datetime], list[Row]]

    @property
    def engines(self) -> tuple[str, ...]:
        """Return the engines that can answer it: pinot, and duckdb if the marts have the same data."""
        return ("pinot", "duckdb") if (_QUERIES / f"{self.name}.duckdb.sql").is_file() else ("pinot",)

    def text(self, engine: str) -> str:
        """Return its SQL. Raises ServiceUsageError if the engine cannot answer it."""
        if engine not in self.engines:
            raise ServiceUsageError(f"{self.name} is not a query of {engine}", hint=f"--engine {self.engines[0]}")
        return (_QUERIES / f"{self.name}{'' if engine == 'pinot' else '.duckdb'}.sql").read_text("utf-8")

    def values(self, given: Mapping[str, str]) -> Values:
        """Return a value for every parameter, None for a missing one. Raises ServiceUsageError for a wrong or unknown one."""
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                raise ServiceUsageError(f"{self.name} has no parameter {name}", hint=f"it has {', '.join(known) or 'none'}")
        values: Values = {}
        for name, parameter in known.items():
            text = given.get(name, parameter.default)
            if text is None and parameter.is_required:
                raise ServiceUsageError(f"{self.name} needs --param {name}=...", hint=parameter.meaning)
            values[name] = None if text is None else _value(parameter, text)
        return values

    def pinot_sql(self, given: Mapping[str, str]) -> str:
        """Return the statement for Pinot, without the lines whose parameter is missing."""
        values = self.values(given)
        lines = (_filled(line, values) for line in self.text("pinot").splitlines() if not line.startswith("--"))
        return "\n".join(line for line in lines if line is not None)

    def ask_pinot(self, client: PinotClient, given: Mapping[str, str], *, now: datetime) -> tuple[list[str], list[list[Any]]]:
        """Return column names and rows. Raises ServiceError, also if there are more rows than one answer can have."""
        try:
            answer = client.ask(self.pinot_sql(given))
        except PinotQueryError as error:
            raise add_hint(error) from None
        if len(answer.rows) >= ROW_LIMIT:
            raise ServiceError(f"{self.name} has more than {ROW_LIMIT:,} rows", hint="narrow it with --param")
        # Pinot returns doubles (sum, count below 2^53) and texts (SUMPRECISION) for whole numbers
        named = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        whole = [{name: int(value) if name in _WHOLE else value for name, value in row.items()} for row in named]
        rows = self.finish(whole, self.values(given), now)
        return list(self.columns), [[row[name] for name in self.columns] for row in rows]


def add_hint(error: PinotQueryError) -> PinotQueryError:
    """Add what to do about the error, if that is known, and return it."""
    hints = {
        190: "tables are made by `adtally services pinot up` once there is a Kafka to read from",
        710: "`adtally services pinot status` names the tables; a model and window have a column only if the rules have the window",
    }
    error.hint = error.hint or hints.get(error.code)
    return error


def named_queries() -> list[NamedQuery]:
    """Return all named queries, sorted by name."""
    return sorted(_NAMED, key=lambda query: query.name)


def named_query(name: str) -> NamedQuery:
    """Return the query of that name. Raises ServiceUsageError if there is none."""
    queries = {query.name: query for query in named_queries()}
    if name not in queries:
        raise ServiceUsageError(f"there is no query {name}", hint=f"one of {', '.join(queries)}")
    return queries[name]


def micros(nanos: int) -> int:
    """Round nanos to micros, half away from zero."""
    return (nanos + 500) // 1000 if nanos >= 0 else -((500 - nanos) // 1000)


def literal(text: str) -> str:
    """Return any text as a literal of Pinot's SQL.

    Pinot looks for OPTION(...) in the whole statement before it parses it, within quotes too, so quoting alone would let a text
    change how the query runs. So other than plain characters are percent-encoded, which Pinot decodes when it compiles.
    """
    if re.fullmatch(r"[A-Za-z0-9_.-]*", text):
        return f"'{text}'"
    return f"decodeUrl('{quote(text, safe='')}')"


def _value(parameter: Parameter, text: str) -> str | int:
    if parameter.kind == "day":
        try:
            return date.fromisoformat(text).isoformat()
        except ValueError:
            raise ServiceUsageError(f"{parameter.name}={text!r} is not a day", hint="as in 2025-06-02") from None
    if parameter.kind == "whole":
        if not re.fullmatch(r"\d{1,18}", text):
            raise ServiceUsageError(f"{parameter.name}={text!r} is not a whole number", hint=parameter.meaning)
        return int(text)
    if parameter.kind == "model":
        if text not in MODELS:
            raise ServiceUsageError(f"{parameter.name}={text!r} is no model", hint=f"one of {', '.join(MODELS)}")
        return text
    if not 1 <= len(text) <= _LONGEST_TEXT:
        raise ServiceUsageError(f"{parameter.name} has {len(text)} characters", hint=f"1 to {_LONGEST_TEXT}")
    return text


def _filled(line: str, values: Values) -> str | None:
    """Return a line of SQL with its parameters replaced by values, or None if one of them is missing."""
    missing = False

    def fill(match: re.Match[str]) -> str:
        nonlocal missing
        name = match[1]
        for suffix, days in (("_start_ms", 0), ("_end_ms", 1)):
            if name.endswith(suffix):
                day = date.fromisoformat(str(values[name.removesuffix(suffix)]))
                return str(((day - date(1970, 1, 1)).days + days) * _DAY_MS)
        if name == "credit":
            return f"{values['model']}_{values['window_days']}d_micros"
        value = values[name]
        missing = missing or value is None
        return str(value) if isinstance(value, int) else literal(str(value))

    filled = re.sub(r":([a-z_]+)", fill, line)
    return None if missing else filled


def _moment(milliseconds: float) -> datetime:
    """Return a UTC time without a zone, as the marts have times."""
    return datetime(1970, 1, 1) + timedelta(milliseconds=int(milliseconds))


def _campaign_day(rows: list[Row], _values: Values, _now: datetime) -> list[Row]:
    for row in rows:
        row["event_date"] = date.fromisoformat(row["event_date"])
        row["gross_impressions"] = row["impressions"] + row["invalid_impressions"]
        row["gross_clicks"] = row["clicks"] + row["invalid_clicks"]
        row["ctr"] = row["clicks"] / row["impressions"] if row["impressions"] else None
        row["spend_micros"] = micros(row["spend_nanos"])
        row["invalid_spend_micros"] = micros(row["invalid_spend_nanos"])
        row["gross_spend_micros"] = micros(row["spend_nanos"] + row["invalid_spend_nanos"])
    return rows


def _spend_by_hour(rows: list[Row], _values: Values, _now: datetime) -> list[Row]:
    for row in rows:
        row["event_hour"], row["spend_micros"] = _moment(row["event_hour"]), micros(row["spend_nanos"])
    return rows


def _budget_pacing(rows: list[Row], values: Values, _now: datetime) -> list[Row]:
    budget, key, spent = values["daily_budget_micros"], None, 0
    assert budget is None or isinstance(budget, int)  # the parameter is a whole number
    made = []
    for row in rows:
        if row["spend_nanos"] == 0:
            continue
        if (row["campaign_id"], row["currency"]) != key:
            key, spent = (row["campaign_id"], row["currency"]), 0
        spent += row["spend_nanos"]
        minute = _moment(row["event_minute"])
        passed = 60 * minute.hour + minute.minute + 1
        row |= {"event_minute": minute, "spent_micros": micros(spent), "daily_budget_micros": budget}
        row["clock_micros"] = None if budget is None else (2 * budget * passed + 1440) // 2880
        row["overspend_micros"] = None if budget is None else max(0, row["spent_micros"] - budget)
        made.append(row)
    return made


def _attributed_revenue(rows: list[Row], _values: Values, _now: datetime) -> list[Row]:
    for row in rows:
        row["touch_date"] = date.fromisoformat(row["touch_date"])
    return rows


def _freshness(rows: list[Row], _values: Values, now: datetime) -> list[Row]:
    for row in rows:
        committed = _moment(row["newest_commit"])
        row["newest_minute"], row["newest_commit"] = _moment(row["newest_minute"]), committed
        row["seconds_since_commit"] = round((now.astimezone(UTC).replace(tzinfo=None) - committed).total_seconds(), 3)
    return rows


_QUERIES = files("services.serving") / "queries"
_COUNTS = ("impressions", "clicks", "invalid_impressions", "invalid_clicks")
_GROSS = ("gross_impressions", "gross_clicks", "ctr")
_SPEND = ("spend_micros", "invalid_spend_micros", "gross_spend_micros")
_WHOLE = {*_COUNTS, "spend_nanos", "invalid_spend_nanos", "revenue_micros", "increments", "newest_version"}
_CAMPAIGN = Parameter("campaign_id", "text", "only this campaign")
_STORE = Parameter("store_id", "text", "only campaigns of this store, the advertiser")
_DAYS = (
    Parameter("from_day", "day", "first day, UTC", is_required=True),
    Parameter("to_day", "day", "last day, UTC", is_required=True),
)
_NAMED = (
    NamedQuery(
        "totals",
        "counts and exact money by currency, to compare with the marts",
        (Parameter("from_day", "day", "from this day on, UTC"), Parameter("to_day", "day", "up to this day, UTC")),
        ("currency", *_COUNTS, "spend_nanos", "invalid_spend_nanos"),
        lambda rows, _values, _now: rows,
    ),
    NamedQuery(
        "campaign_day",
        "delivery and spend by campaign and day: net, invalid, gross",
        (*_DAYS, _CAMPAIGN, _STORE),
        ("event_date", "campaign_id", "store_id", "currency", *_COUNTS, *_GROSS, *_SPEND),
        _campaign_day,
    ),
    NamedQuery(
        "spend_by_hour",
        "net delivery and spend by campaign and hour",
        (*_DAYS, _CAMPAIGN, _STORE),
        ("event_hour", "campaign_id", "currency", "impressions", "clicks", "spend_micros"),
        _spend_by_hour,
    ),
    NamedQuery(
        "budget_pacing",
        "what a day's campaigns had spent by the end of each minute with spend",
        (
            Parameter("day", "day", "the day, UTC", is_required=True),
            _CAMPAIGN,
            Parameter("daily_budget_micros", "whole", "the budget to compare with; the marts know it, Pinot does not"),
        ),
        ("event_minute", "campaign_id", "currency", "spent_micros", "daily_budget_micros", "clock_micros", "overspend_micros"),
        _budget_pacing,
    ),
    NamedQuery(
        "attributed_revenue",
        "revenue credited to campaigns by one model and window, by the day of the touch",
        (
            *_DAYS,
            Parameter("model", "model", f"one of {', '.join(MODELS)}", default="last_click"),
            Parameter("window_days", "whole", "lookback window in days, one of the attribution rules'", default="7"),
            _CAMPAIGN,
            _STORE,
        ),
        ("touch_date", "store_id", "campaign_id", "currency", "revenue_micros"),
        _attributed_revenue,
    ),
    NamedQuery(
        "freshness",
        "the newest increment of each region",
        (),
        ("region", "increments", "newest_minute", "newest_version", "newest_commit", "seconds_since_commit"),
        _freshness,
    ),
)
