"""Dagster's view: the assets and their lineage."""

from __future__ import annotations

import dagster as dg

from orchestration.definitions import defs


def test_every_mart_goes_back_to_the_delta_tables() -> None:
    graph = defs.resolve_asset_graph()
    marts = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).group_name == "marts"}
    wanted = {
        "dim_ad",
        "dim_campaign",
        "dim_store",
        "fct_campaign_day",
        "fct_campaign_minute",
        "fct_event_accounting",
        "mart_build",
    }
    assert wanted <= marts
    tables = {"ad_events", "batch_ledger", "campaigns", "minute_metrics", "orders", "rejected_events", "rejected_orders"}
    for mart in wanted - {"mart_build"}:
        above = set(graph.get(dg.AssetKey(mart)).parent_keys)
        reached = set()
        while above:
            key = above.pop()
            reached.add(key.to_user_string())
            above |= set(graph.get(key).parent_keys)
        assert reached & tables, mart
        assert "landing_files" in reached, mart
