"""Imports dagster-dbt without dbt-core, whose import takes longer than all other definitions together.

The code server and each run load the definitions, which only read dbt's manifest. dbt itself runs in a separate process.
dagster-dbt imports dbt-core if it is installed, and works without it.
"""

import sys

_VERSION = "dbt.version"  # the first module of dbt-core that dagster-dbt imports
_HIDES_DBT = _VERSION not in sys.modules

if _HIDES_DBT:
    sys.modules[_VERSION] = None  # type: ignore[assignment]  # an import of it fails
try:
    from dagster_dbt import DagsterDbtTranslator as DagsterDbtTranslator
    from dagster_dbt import DbtProject as DbtProject
    from dagster_dbt import dbt_assets as dbt_assets
finally:
    if _HIDES_DBT:
        del sys.modules[_VERSION]
