"""Named queries without a server: parameters that stay in their place, rounding, columns; and the tables' configuration."""

from __future__ import annotations

import re
from fractions import Fraction
from math import floor
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.launcher.errors import ServiceUsageError
from services.serving.named import literal, micros, named_queries, named_query
from services.serving.tables import MODELS, WINDOW_DAYS, Source, credits_schema, table_specs
from spark_jobs.attribution.rules import MODELS as OUR_MODELS
from spark_jobs.attribution.rules import AttributionRules


@given(st.text(max_size=128))
def test_a_text_is_one_literal_whatever_is_in_it(text: str) -> None:
    made = literal(text)
    plain = re.fullmatch(r"'([A-Za-z0-9_.-]*)'", made)
    encoded = re.fullmatch(r"decodeUrl\('([A-Za-z0-9_.~%-]*)'\)", made)
    assert plain or encoded
    assert (plain[1] if plain else unquote(encoded[1]) if encoded else None) == text


@given(st.integers(-(2**70), 2**70))
def test_micros_are_rounded_half_away_from_zero(nanos: int) -> None:
    size = floor(Fraction(abs(nanos), 1000) + Fraction(1, 2))
    assert micros(nanos) == (size if nanos >= 0 else -size)


def test_lines_of_parameters_that_are_left_out_are_left_out() -> None:
    query = named_query("campaign_day")
    days = {"from_day": "2025-06-02", "to_day": "2025-06-03"}
    assert "campaign_id =" not in query.pinot_sql(days)
    asked = query.pinot_sql(days | {"campaign_id": "x' option(skipUpsert=true)"})
    assert "\n  and campaign_id = decodeUrl('x%27%20option%28skipUpsert%3Dtrue%29')\n" in asked
    assert "event_date >= '2025-06-02'\n" in asked and ":" not in asked


def test_a_model_and_window_are_a_column() -> None:
    asked = named_query("attributed_revenue").pinot_sql(
        {"from_day": "1970-01-02", "to_day": "1970-01-02", "model": "linear", "window_days": "30"}
    )
    assert "sumprecision(linear_30d_micros)" in asked
    assert "touch_time >= 86400000\n" in asked and "touch_time < 172800000\n" in asked


@pytest.mark.parametrize("query", named_queries(), ids=lambda query: query.name)
def test_every_query_says_how_many_rows_and_names_its_columns(query) -> None:
    for engine in query.engines:
        assert query.text(engine).rstrip().endswith("limit 50000")
    assert query.text("pinot").startswith("-- ")
    assert re.search(r"\bsum\((?!impressions|clicks|invalid_impressions|invalid_clicks)", query.text("pinot")) is None


def test_models_and_windows_are_those_of_the_rules() -> None:
    assert MODELS == OUR_MODELS
    assert AttributionRules().window_days == WINDOW_DAYS
    names = [column["name"] for column in credits_schema()["metricFieldSpecs"]]
    assert len(names) == 1 + len(MODELS) * len(WINDOW_DAYS) and "time_decay_30d_micros" in names
    assert "user_id" not in str(credits_schema())


def test_a_login_goes_to_kafkas_client_and_into_no_text() -> None:
    login = {"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.jaas.config": 'password="hidden"'}
    source = Source("k:9093", client_options={"sasl.password": "hidden"}, java_options=login)
    specs = table_specs(source)
    for spec in specs:
        stream = spec.config["tableIndexConfig"]["streamConfigs"]
        assert login.items() <= stream.items()
        assert stream["stream.kafka.isolation.level"] == "read_committed" and stream["auto.offset.reset"] == "none"
    assert "hidden" not in repr(source) + repr(specs)
    with pytest.raises(ServiceUsageError, match=r"isolation\.level of Kafka cannot be set"):
        table_specs(Source("k:9093", java_options={"isolation.level": "read_uncommitted"}))
