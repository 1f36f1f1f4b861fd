"""Read the rows of CSV files of the landing folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.files.landing import csv_files, open_regular

Row = dict[str | None, str | None]  # of csv.DictReader: the key None has the values that no column names


def read_rows(
    landing: Path,
    folder: str,
    columns: Sequence[str],
    error: type[AdtallyError],
    check_header: Callable[[str, Sequence[str]], None] = lambda _name, _header: None,
) -> Iterator[tuple[str, str, Row]]:
    """Yield (file, place, row) of the files of a folder in the order of their names; a place is the file and the line.

    Raises ``error`` if a file is unreadable or lacks one of the ``columns``, and what ``check_header`` raises.
    """
    for name in csv_files(landing, folder):
        try:
            with io.TextIOWrapper(open_regular(landing / name, depth=2), encoding="utf-8-sig", newline="") as handle:
                reader = csv.DictReader(handle)
                header = reader.fieldnames or ()
                check_header(name, header)
                if missing := [column for column in columns if column not in header]:
                    raise error(f"{name}: columns missing: {', '.join(missing)}")
                for row in reader:
                    yield name, f"{name}, line {reader.line_num}", row
        except (OSError, UnicodeDecodeError, csv.Error) as problem:
            raise error(f"{name}: cannot be read as CSV in UTF-8: {problem}") from None
