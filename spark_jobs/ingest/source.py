"""Define the sources of records. Spark keeps a source's offsets in a checkpoint and plans batches; a source reads their plans."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.checkpoint_log import has_plan
from spark_jobs.ingest.durable_checkpoint import read_query_id
from spark_jobs.ingest.files.checkpoint import BatchFiles, count_files, has_read_all, read_batch_files
from spark_jobs.ingest.files.landing import LandingFile, Split, name_below, plan_splits, reason_of, relative_name
from spark_jobs.ingest.kafka.ranges import OffsetRange, OffsetSplit

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# Spark measures a file's age from the newest file, whose time may be centuries ahead: any smaller age would skip files
_NO_AGE = f"{2**63 - 1}ms"
FULL_SHARE = 0.5
"""A batch with more than this share of the largest size is full. Spark does not add a file that would exceed the size."""
_LISTED_SECONDS = 15e-6  # CPU time for each file
_FILE_SCHEMA = "path STRING, modificationTime TIMESTAMP, length BIGINT, content BINARY"


@dataclass(frozen=True)
class Planned:
    """The input of a batch: files, or ranges of offsets. ``planned_us`` is the time of planning in microseconds.

    ``lost_offsets`` counts the offsets that an operator gave up: the topic no longer has them.
    """

    planned_us: int
    files: list[LandingFile] = field(default_factory=list)
    ranges: list[OffsetRange] = field(default_factory=list)
    lost_offsets: int = 0


class RecordSource(ABC):
    """One source of one stream. The ledger has its ``kind``; its query and its checkpoint have its ``name``."""

    kind: str
    name: str
    checkpoint: Path

    def query_id(self) -> str:
        """Return the id of the source's streaming query, which Spark keeps in the checkpoint."""
        return read_query_id(self.checkpoint)

    @abstractmethod
    def load(self, spark: SparkSession) -> DataFrame:
        """Return the streaming frame. Only its offsets are used, never its rows."""

    def before_batch(self) -> None:
        """Write what the source adds to its checkpoint. Nothing by default."""
        return

    @abstractmethod
    def plan(self, batch_id: int) -> Planned:
        """Return the input of a batch: always the same, for as long as the batch can run again."""

    @abstractmethod
    def splits(self, planned: Planned) -> Sequence[Split | OffsetSplit]:
        """Cut the input of a batch into the splits that tasks read, in the order of the records."""

    @abstractmethod
    def has_records(self, batch_id: int) -> bool:
        """Return whether a batch has any input; False if the checkpoint no longer has its plan."""

    def has_ended(self) -> bool:
        """Return whether Spark would plan no batch and finish none. False by default: then only Spark can tell."""
        return False

    def look_seconds(self) -> float:
        """Return about how much CPU time it costs Spark to look for new input. 0 by default: next to nothing."""
        return 0.0

    @abstractmethod
    def is_full(self, batch_id: int) -> bool:
        """Return whether a batch has about as much input as a batch may have, so that the source probably has more."""

    def regions(self, splits: Sequence[Split | OffsetSplit]) -> list[str]:
        """Return the regions by which the ledger counts a batch."""
        return sorted({split.region for split in splits})

    def place(self, path: str) -> str:
        """Return the present path of a file that a commit calls ``path``. A topic has none."""
        return path

    def explained(self, error: Exception) -> AdtallyError | None:
        """Return the source's own error if the source caused ``error``."""
        return None


class FilesSource(RecordSource):
    """The landing folder of a stream."""

    kind = "files"

    def __init__(self, settings: Settings, stream: str, checkpoints: Path | None = None) -> None:
        """``checkpoints`` is the folder of the checkpoints, by default that of this machine's ingest."""
        self.name = stream
        self.checkpoint = (checkpoints or settings.checkpoints_path) / stream
        self._settings = settings
        self._folder = settings.landing_path / stream

    def load(self, spark: SparkSession) -> DataFrame:
        """See RecordSource."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files, size = self._settings.max_files_per_batch, self._settings.max_bytes_per_batch
        options = {
            "pathGlobFilter": "*.{jsonl,jsonl.gz}",
            "recursiveFileLookup": "true",  # otherwise Spark takes folders such as day=1 for partitions
            "maxFileAge": _NO_AGE,
            **({"maxFilesPerTrigger": str(files)} if files else {"maxBytesPerTrigger": str(size)}),
        }
        folder = re.sub(r"[*?\[\]{}\\]", r"\\\g<0>", str(self._folder))  # the path is a glob
        reader = spark.readStream.format("binaryFile").schema(_FILE_SCHEMA).options(**options)
        return reader.load(f"file://{folder}").select("path")

    def plan(self, batch_id: int) -> Planned:
        """See RecordSource. Skips files for which `reason_of` has a reason, though Spark lists them; `adtally status` counts them.

        Raises LandingPathError for a file outside the folder of the stream.
        """
        settings = self._settings
        planned = self._batch_files(batch_id)
        names = (relative_name(file.path, settings.landing_uri) for file in planned.files)
        taken = [file for file, name in zip(planned.files, names, strict=True) if reason_of(settings.landing_path, name) is None]
        return Planned(planned.planned_us, taken)

    def _batch_files(self, batch_id: int) -> BatchFiles:
        landing = self._settings.landing_path
        return read_batch_files(self.checkpoint, batch_id, self.place, lambda path: self.place(path, landing))

    def has_records(self, batch_id: int) -> bool:
        """See RecordSource."""
        return has_plan(self.checkpoint, batch_id) and bool(self.plan(batch_id).files)

    def has_ended(self) -> bool:
        """See RecordSource. Raises TableCorruptionError if the checkpoint is not in the format of this Spark version."""
        return has_read_all(self.checkpoint, self._folder)

    def look_seconds(self) -> float:
        """See RecordSource. Spark lists all files, those of earlier batches too."""
        return count_files(self._folder) * _LISTED_SECONDS

    def is_full(self, batch_id: int) -> bool:
        """See RecordSource."""
        files = self._batch_files(batch_id).files
        most = self._settings.max_files_per_batch
        if most is not None:
            return len(files) >= most
        return sum(file.size for file in files) > FULL_SHARE * self._settings.max_bytes_per_batch

    def splits(self, planned: Planned) -> list[Split]:
        """See RecordSource."""
        files = [replace(file, path=self.place(file.path)) for file in planned.files]
        return plan_splits(files, self._settings.landing_uri, self._settings.split_bytes)

    def place(self, path: str, root: Path | None = None) -> str:
        """Return the present path, below ``root`` or where it is read, of a file that a checkpoint or a commit calls ``path``."""
        return f"{root or self._settings.landing_uri}/{name_below(path, self._settings, self.name)}"
