"""Names of campaigns, ads and stores for people to read, from CSV files of the landing folder into table `names`.

Names decide nothing: no price, rule or credit looks at them. A bad file therefore leaves the names as they were and stops nobody.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.errors import NamesFileError
from spark_jobs.ingest.files.landing import NAMES_FOLDER, csv_files, open_regular
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import NAMES
from spark_jobs.steps import Step

COLUMNS = ("kind", "id", "name")
KINDS = ("campaign", "ad", "store")
_LONGEST = {"id": 128, "name": 200}


def read_names(landing: Path) -> list[dict[str, str]]:
    """The rows of table `names` as ``<landing>/names/*.csv`` say, sorted.

    Of two names of one id the later one holds; files are read in the order of their names. Raises NamesFileError with the file, the
    line and the rule.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in csv_files(landing, NAMES_FOLDER):
        try:
            with io.TextIOWrapper(open_regular(landing / name, depth=2), encoding="utf-8-sig", newline="") as handle:
                reader = csv.DictReader(handle)
                if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
                    raise NamesFileError(f"{name}: columns missing: {', '.join(missing)}")
                for row in reader:
                    one = _name(row, f"{name}, line {reader.line_num}")
                    found[one["kind"], one["id"]] = one | {"source_file": name}
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise NamesFileError(f"{name}: cannot be read as CSV in UTF-8: {error}") from None
    return [found[key] for key in sorted(found)]


def _name(row: dict[str, str | None], where: str) -> dict[str, str]:
    values = {column: (row[column] or "").strip() for column in COLUMNS}
    if values["kind"] not in KINDS:
        raise NamesFileError(f"{where}: kind must be one of {', '.join(KINDS)}, not {values['kind']!r}")
    for column, longest in _LONGEST.items():
        if not 1 <= len(values[column]) <= longest or not values[column].isprintable():
            raise NamesFileError(f"{where}: {column} must have 1 to {longest} printable characters")
    return values


def load_names(settings: Settings) -> int:
    """Bring table `names`, which is there, up to the CSV files. Returns its version.

    Nothing is written when the files say what the table holds. Raises NamesFileError.
    """
    log = DeltaLog(settings.table_uri(NAMES.name))
    names = read_names(settings.landing_path)
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    held = log.newest_metadata()
    if names if held is None else held.get("names_sha256") != digest:
        rows = pa.Table.from_pylist(names, NAMES.schema)
        Lake(settings).replace(NAMES, rows, Step.NAMES, metadata={"names_sha256": digest})
    return log.latest_version() or 0


def names_file_problems(settings: Settings) -> list[str]:
    """What is wrong with the files of names, for a person; empty where nothing is."""
    try:
        read_names(settings.landing_path)
    except NamesFileError as error:
        return [f"{error}; the names in the marts stay"]
    return []
