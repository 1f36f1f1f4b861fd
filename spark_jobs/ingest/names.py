"""Load the names of campaigns, ads and stores from CSV files of the landing folder into table `names`.

Only people read the names; no price, rule or credit depends on them. So a bad file leaves the names as they are and stops nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.errors import NamesFileError
from spark_jobs.ingest.csv_rows import read_rows
from spark_jobs.ingest.files.landing import NAMES_FOLDER
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import NAMES
from spark_jobs.steps import Step

COLUMNS = ("kind", "id", "name")
KINDS = ("campaign", "ad", "store")
_LONGEST = {"id": 128, "name": 200}


def read_names(landing: Path) -> list[dict[str, str]]:
    """Return the rows of table `names` from CSV files, sorted. The later of two names of an id applies. Raises NamesFileError."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for file, where, row in read_rows(landing, NAMES_FOLDER, COLUMNS, NamesFileError):
        values = {column: (row[column] or "").strip() for column in COLUMNS}
        if values["kind"] not in KINDS:
            raise NamesFileError(f"{where}: kind must be one of {', '.join(KINDS)}, not {values['kind']!r}")
        for column, longest in _LONGEST.items():
            if not 1 <= len(values[column]) <= longest or not values[column].isprintable():
                raise NamesFileError(f"{where}: {column} must have 1 to {longest} printable characters")
        found[values["kind"], values["id"]] = values | {"source_file": file}
    return [found[key] for key in sorted(found)]


def load_names(settings: Settings) -> int:
    """Replace table `names`, which must exist, by the content of the CSV files, if it is new; return the table's version."""
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
