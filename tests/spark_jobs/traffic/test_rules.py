"""The judge of the rules that need only one record."""

from __future__ import annotations

import pyarrow as pa
import pytest

from spark_jobs.traffic.rules import BITS, RecordJudge, Rule, no_rules

USERS = ["10.0.0.1", "10.0.0.200", "10.0.1.0", "9.255.255.255", "2001:db8::1", "2001:db9::", "10.0.0", "u-1", "", None]
INSIDE = ["10.0.0.1", "10.0.0.200", "2001:db8::1"]


@pytest.mark.parametrize(
    "networks", [("10.0.0.0/24", "2001:db8::/32"), ("10.0.0.0/25", "10.0.0.0/24", "10.0.0.128/26", "2001:db8::/32")]
)
def test_an_address_hits_by_any_network_that_has_it(networks: tuple[str, ...]) -> None:
    judge = RecordJudge(no_rules().model_copy(update={"listed_network": Rule(), "networks": networks}))
    events = pa.table({"user_id": pa.array(USERS, pa.string()), "user_agent": pa.nulls(len(USERS), pa.string())})
    assert [user for user, code in zip(USERS, judge.codes(events), strict=True) if code == BITS["listed_network"]] == INSIDE
    assert judge.looks_at_users
