"""Names of campaigns, ads and stores for people to read, from CSV files of the landing folder into table `names`.

Names decide nothing: no price, rule or credit looks at them. A bad file therefore leaves the names as they were and stops nobody.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.errors import NamesFileError
from spark_jobs.ingest.files.landing import CAMPAIGNS_FOLDER, NAMES_FOLDER, csv_files, open_regular
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import NAMES
from spark_jobs.steps import Step

COLUMNS = ("kind", "id", "name")
KINDS = ("campaign", "ad", "store")
OF_CAMPAIGNS = {"campaign_name": "campaign", "store_name": "store"}
"""Optional columns of the campaigns files that contain names, and the kind that each names (by its ``<kind>_id``)."""
_LONGEST = {"id": 128, "name": 200}


def read_names(landing: Path) -> list[dict[str, str]]:
    """The rows of table `names` as ``<landing>/campaigns/*.csv`` and ``<landing>/names/*.csv`` say, sorted.

    Of two names of one id the later one holds: the campaigns files are read first, and the files of a folder in the order of their
    names. Raises NamesFileError with the file, the line and the rule.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, where, row in _rows(landing, CAMPAIGNS_FOLDER, ()):
        for column, kind in OF_CAMPAIGNS.items():
            if (row.get(column) or "").strip():
                one = _name({"kind": kind, "id": row.get(f"{kind}_id"), "name": row[column]}, where, column)
                found[one["kind"], one["id"]] = one | {"source_file": name}
    for name, where, row in _rows(landing, NAMES_FOLDER, COLUMNS):
        one = _name(row, where, "name")
        found[one["kind"], one["id"]] = one | {"source_file": name}
    return [found[key] for key in sorted(found)]


def _rows(landing: Path, folder: str, required: Sequence[str]) -> Iterator[tuple[str, str, dict[str, str | None]]]:
    """File, place (for messages) and values of each row of the CSV files in a folder, which must have the ``required`` columns."""
    for name in csv_files(landing, folder):
        try:
            with io.TextIOWrapper(open_regular(landing / name, depth=2), encoding="utf-8-sig", newline="") as handle:
                reader = csv.DictReader(handle)
                if missing := [column for column in required if column not in (reader.fieldnames or ())]:
                    raise NamesFileError(f"{name}: columns missing: {', '.join(missing)}")
                for row in reader:
                    yield name, f"{name}, line {reader.line_num}", row
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise NamesFileError(f"{name}: cannot be read as CSV in UTF-8: {error}") from None


def _name(row: Mapping[str, str | None], where: str, column_of_name: str) -> dict[str, str]:
    values = {column: (row[column] or "").strip() for column in COLUMNS}
    if values["kind"] not in KINDS:
        raise NamesFileError(f"{where}: kind must be one of {', '.join(KINDS)}, not {values['kind']!r}")
    for column, longest in _LONGEST.items():
        if not 1 <= len(values[column]) <= longest or not values[column].isprintable():
            shown = column_of_name if column == "name" else column
            raise NamesFileError(f"{where}: {shown} must have 1 to {longest} printable characters")
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
