"""Load the names of campaigns, ads and stores from CSV files of the landing folder into table `names`.

Only people read the names; no price, rule or credit depends on them. So a bad file leaves the names as they are and stops nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.errors import NamesFileError
from spark_jobs.ingest.csv_rows import read_rows
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.landing_view import CAMPAIGNS_FOLDER, NAMES_FOLDER, refresh_landing
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import NAMES
from spark_jobs.steps import Step

COLUMNS = ("kind", "id", "name")
KINDS = ("campaign", "ad", "store")
OF_CAMPAIGNS = {"campaign_name": "campaign", "store_name": "store"}
"""Optional columns of the campaigns files that contain names, and the kind that each names (by its ``<kind>_id``)."""
_LONGEST = {"id": 128, "name": 200}


def read_names(landing: Path) -> list[dict[str, str]]:
    """Return the rows of table `names`, sorted, from the CSV files of campaigns and of names.

    The later of two names of an id applies: the files of campaigns come first, and the files of a folder in the order of their
    names. Raises NamesFileError with the file, the line and the rule.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for file, where, row in read_rows(landing, CAMPAIGNS_FOLDER, (), NamesFileError):
        for column, kind in OF_CAMPAIGNS.items():
            if (row.get(column) or "").strip():
                name = _name({"kind": kind, "id": row.get(f"{kind}_id"), "name": row[column]}, where, column)
                found[name["kind"], name["id"]] = name | {"source_file": file}
    for file, where, row in read_rows(landing, NAMES_FOLDER, COLUMNS, NamesFileError):
        name = _name({column: row[column] for column in COLUMNS}, where, "name")
        found[name["kind"], name["id"]] = name | {"source_file": file}
    return [found[key] for key in sorted(found)]


def _name(row: Mapping[str, str | None], where: str, column_of_name: str) -> dict[str, str]:
    """Return a checked row of table `names`. ``column_of_name`` is what the file calls the name."""
    values = {column: (row[column] or "").strip() for column in COLUMNS}
    if values["kind"] not in KINDS:
        raise NamesFileError(f"{where}: kind must be one of {', '.join(KINDS)}, not {values['kind']!r}")
    for column, longest in _LONGEST.items():
        if not 1 <= len(values[column]) <= longest or not values[column].isprintable():
            shown = column_of_name if column == "name" else column
            raise NamesFileError(f"{where}: {shown} must have 1 to {longest} printable characters")
    return values


def load_names(settings: Settings) -> int:
    """Replace table `names`, which must exist, by the content of the CSV files, if it is new; return the table's version."""
    refresh_landing(settings)
    log = DeltaLog(settings.table_uri(NAMES.name))
    names = read_names(settings.landing_path)
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    metadata = log.newest_metadata()
    if names if metadata is None else metadata.get("names_sha256") != digest:
        rows = pa.Table.from_pylist(names, NAMES.schema)
        Lake(settings).replace(NAMES, rows, Step.NAMES, metadata={"names_sha256": digest})
    return log.latest_version() or 0


def names_file_problems(settings: Settings) -> list[str]:
    """Return a line for people if a file of names is bad."""
    try:
        read_names(settings.landing_path)
    except NamesFileError as error:
        return [f"{error}; the names in the marts stay"]
    return []
