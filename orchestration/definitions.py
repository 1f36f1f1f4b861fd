"""What Dagster knows of: listed, not discovered."""

from __future__ import annotations

import dagster as dg

from orchestration.assets.lakehouse import LANDING, ingest
from orchestration.assets.marts import marts

defs = dg.Definitions(
    assets=[LANDING, ingest, marts],
    jobs=[
        dg.define_asset_job(
            "ingest_and_build", dg.AssetSelection.assets(*ingest.keys, *marts.keys), description="Ingest, then the marts."
        ),
    ],
)
