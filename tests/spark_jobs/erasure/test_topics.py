"""Topics: how long they keep an id, and that what Pinot serves has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from topics import Topic, point_at

from services.launcher.kafka import Kafka
from services.serving.tables import Source, table_specs
from spark_jobs.config import load_settings
from spark_jobs.erasure.retention import retention_problems

_DAY_MS = 24 * 3_600_000


@pytest.mark.services
def test_a_topic_that_keeps_records_longer_than_a_request_may_take_is_named(kafka: Kafka, tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "home", erasure_days=30)
    assert retention_problems(settings) == []
    servers = kafka.bootstrap_servers
    short, long = (Topic(servers, "retained", config={"retention.ms": str(days * _DAY_MS)}) for days in (29, 31))
    endless = Topic(servers, "retained", config={"retention.ms": "-1"})
    point_at(settings, ("eu", short, long), ("us", endless, short))
    found = retention_problems(settings)
    assert [line.split(" ")[1] for line in found] == [long.name, endless.name]
    assert "longer than ADTALLY_ERASURE_DAYS (30 days)" in found[0]
    assert "for ever" in found[1]
    endless.delete()
    assert "does not say how long" in retention_problems(settings)[1]


def test_pinot_has_no_column_with_a_person() -> None:
    specs = table_specs(Source("localhost:1"))
    assert len(specs) == 2
    for spec in specs:
        assert "event_date" in json.dumps(spec.schema) or "time" in json.dumps(spec.schema)
        assert "user" not in json.dumps(spec.schema)
