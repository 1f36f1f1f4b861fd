"""The base of the recounts of both streams: SQL over the parsed input.

A recount judges every record of every occurrence: a file that two batches took counts twice. It reads the parsed files of the hours
asked, and of all other hours only the hashes of the ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import pyarrow as pa

from spark_jobs.audit.contract import record_schema
from spark_jobs.audit.database import Database, path_list
from spark_jobs.audit.inputs import LEFT_OUT, Inputs
from spark_jobs.audit.plans import LIMITS
from spark_jobs.config import Settings
from spark_jobs.units import HOUR_US, NO_HOUR

_BATCH_NUMBERS = ("batch_id", "version", *LIMITS, "campaigns_version", "rejects_kept")


def parsed_records(files: Collection[str]) -> str:
    """Return SQL for the records of parsed files, with the file as ``filename``."""
    return f"read_parquet({path_list(files)}, filename = true)" if files else "no_records"


def occurring(files: Collection[str]) -> str:
    """Return SQL for the records (``r``) of parsed files, once for each of the `occurrences` that has them."""
    return f"{parsed_records(files)} r join occurrences on parquet = filename and line >= first_line and line < end_line"


def within(column: str, hours: Collection[int]) -> str:
    """Return a condition that bounds a column of microseconds, so that statistics skip files. Gaps between ``hours`` are inside."""
    known = [hour for hour in hours if hour != NO_HOUR]
    bounds = f"{column} >= {min(known) * HOUR_US} and {column} < {(max(known) + 1) * HOUR_US}" if known else "false"
    return f"(({bounds}) or {column} is null)" if NO_HOUR in hours else f"({bounds})"


class Recount(ABC):
    """A recount of ``inputs`` in ``database``. ``count`` makes the table `outcomes` for the hours that it is asked for.

    Other tables: `batches` (b, identity, limits, state), `occurrences` (o, in the order of reading: what is there), `absent` (what
    is not there), `set_aside` (what the batches did not read). Hours are numbers since the epoch.
    """

    def __init__(self, database: Database, inputs: Inputs) -> None:
        self.database = database
        self.inputs = inputs
        schema = record_schema(inputs.stream).append(pa.field("filename", pa.string()))
        database.keep("no_records", schema.empty_table())
        self._load_batches()
        self._load_occurrences()
        self._load_set_aside()

    @property
    def settings(self) -> Settings:
        """The settings of the lake."""
        return self.inputs.snapshot.lake.settings

    @abstractmethod
    def count(self, hours: Collection[int]) -> None:
        """Make the table `outcomes` for ``hours``: each record with its outcome."""

    @abstractmethod
    def recorded_hours(self) -> set[int]:
        """Return all hours of which a table of the stream has a row."""

    def all_hours(self) -> set[int]:
        """Return all hours of which the raw input or a table has a record."""
        hours = self.recorded_hours() | set(self.records_by_hour())
        return hours | {NO_HOUR} if any(plan.set_aside for plan in self.inputs.plans) else hours

    def records_by_hour(self, hours: Collection[int] | None = None) -> dict[int, int]:
        """Count the records of each hour (of ``hours``; None: of all) in the parsed files, each once."""
        records = parsed_records(self._all_files() if hours is None else self._files_of(hours))
        where = "true" if hours is None else within("time_us", hours)
        found = self.database.rows(f"select hour_of(time_us) as hour, count(*) from {records} where {where} group by hour")
        return {hour: records for hour, records in found if hours is None or hour in hours}

    def hours_of_batch(self, number: int) -> set[int]:
        """Return the hours in which a batch has records."""
        files = {str(found.entry.parquet) for found in self.inputs.occurrences if found.batch == number and found.entry}
        return set(self.database.values(f"select distinct hour_of(r.time_us) from {occurring(files)} where b = {number}"))

    def raw_ids(self, ids: str) -> str:
        """Return SQL for the valid record ids in all parsed files that the query ``ids`` has."""
        return f"select record_id from {parsed_records(self._all_files())} where is_valid and record_id in ({ids})"

    def _all_files(self) -> list[str]:
        return sorted(str(entry.parquet) for entry in self.inputs.entries)

    def _files_of(self, hours: Collection[int]) -> list[str]:
        """Return the parsed files that may have records of ``hours``."""
        known = [hour for hour in hours if hour != NO_HOUR]
        low, high = (min(known) * HOUR_US, (max(known) + 1) * HOUR_US) if known else (0, 0)
        return sorted(
            str(entry.parquet)
            for entry in self.inputs.entries
            if (entry.min_us is not None and entry.max_us is not None and entry.min_us < high and entry.max_us >= low)
            or (NO_HOUR in hours and entry.has_unknown_time)
        )

    def _load_batches(self) -> None:
        plans, inputs = self.inputs.plans, self.inputs
        partial = {found.batch for found in inputs.gone} | inputs.lost
        batches = {
            "b": pa.array(range(len(plans)), pa.int64()),
            **{name: pa.array([getattr(plan, name) for plan in plans], pa.string()) for name in ("query_id", "rule_set")},
            **{name: pa.array([getattr(plan, name) for plan in plans], pa.int64()) for name in _BATCH_NUMBERS},
            "state": pa.array(inputs.states, pa.string()),
            "is_left_out": pa.array([state in LEFT_OUT for state in inputs.states], pa.bool_()),
            "is_partial": pa.array([number in partial for number in range(len(plans))], pa.bool_()),
        }
        self.database.keep("batches", pa.table(batches))

    def _load_occurrences(self) -> None:
        here, absent = [], []
        for o, found in enumerate(self.inputs.occurrences):
            place = (o, found.batch, found.name, found.start, found.end)
            if found.entry is None:
                absent.append(place)
            else:
                here.append((*place, found.entry.region, str(found.entry.parquet)))
        columns = {"o": pa.int64(), "b": pa.int64(), "name": pa.string(), "first_line": pa.int64(), "end_line": pa.int64()}
        self.database.keep_rows("absent", absent, **columns)
        self.database.keep_rows("occurrences", here, **columns, region=pa.string(), parquet=pa.string())

    def _load_set_aside(self) -> None:
        found = [(b, one) for b, plan in enumerate(self.inputs.plans) for one in plan.set_aside]
        # A negative o, because there is no occurrence.
        rows = [(-1 - at, b, one.name, one.name.split("/")[1], one.start, [one.reason]) for at, (b, one) in enumerate(found)]
        columns = {"o": pa.int64(), "b": pa.int64(), "name": pa.string(), "region": pa.string(), "line": pa.int64()}
        self.database.keep_rows("set_aside", rows, **columns, reasons=pa.list_(pa.string()))
