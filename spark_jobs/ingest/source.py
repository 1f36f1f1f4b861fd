"""A source of records: the streaming frame whose offsets are the batches, and what a batch of it consists of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.files.checkpoint import read_batch_files
from spark_jobs.ingest.files.landing import LandingFile, Split, name_below, plan_splits, reason_of, relative_name
from spark_jobs.ingest.kafka.ranges import OffsetRange, OffsetSplit

# Spark measures a file's age from the newest file, whose time may lie centuries ahead; less than this would leave files out
_NO_AGE = f"{2**63 - 1}ms"
_FILE_SCHEMA = "path STRING, modificationTime TIMESTAMP, length BIGINT, content BINARY"


@dataclass(frozen=True)
class Planned:
    """A batch's records: files, or ranges of offsets; and when it was planned, in microseconds.

    ``lost_offsets`` are those that an operator let it go past: nobody can read them any more.
    """

    planned_us: int
    files: list[LandingFile] = field(default_factory=list)
    ranges: list[OffsetRange] = field(default_factory=list)
    lost_offsets: int = 0


class Source(ABC):
    """Of one stream. ``kind`` and ``regions`` name it in the ledger; ``name`` is that of the query and of its checkpoint."""

    kind: str
    name: str
    checkpoint: Path

    @abstractmethod
    def load(self, spark: SparkSession) -> DataFrame:
        """The streaming frame. Its rows are not read: its offsets are."""

    @abstractmethod
    def plan(self, batch_id: int) -> Planned:
        """What a batch consists of, the same for as long as it can run again."""

    @abstractmethod
    def splits(self, planned: Planned) -> Sequence[Split | OffsetSplit]:
        """What the tasks of a batch read, in the order of its records."""

    @abstractmethod
    def has_records(self, batch_id: int) -> bool:
        """Whether a batch of the checkpoint was planned to read anything; False where the checkpoint no longer has it."""

    def regions(self, splits: Sequence[Split | OffsetSplit]) -> list[str]:
        """The regions that the ledger counts a batch by."""
        return sorted({split.region for split in splits})

    def explained(self, error: Exception) -> AdtallyError | None:
        """The error in the source's own words where it is at fault; None: it is not."""
        return None


class FilesSource(Source):
    """The landing folder of a stream."""

    kind = "files"

    def __init__(self, settings: Settings, stream: str) -> None:
        self.name = stream
        self.checkpoint = settings.checkpoints_path / stream
        self._settings = settings
        self._folder = settings.landing_path / stream

    def load(self, spark: SparkSession) -> DataFrame:
        """See Source."""
        self._folder.mkdir(parents=True, exist_ok=True)
        reader = (
            spark.readStream.format("binaryFile")
            .schema(_FILE_SCHEMA)
            .option("pathGlobFilter", "*.{jsonl,jsonl.gz}")
            .option("recursiveFileLookup", "true")  # or folders such as day=1 would be taken for partitions
            .option("maxFileAge", _NO_AGE)
        )
        if self._settings.max_files_per_batch:
            reader = reader.option("maxFilesPerTrigger", self._settings.max_files_per_batch)
        else:
            reader = reader.option("maxBytesPerTrigger", self._settings.max_bytes_per_batch)
        return reader.load(f"file://{_escape_glob(str(self._folder))}").select("path")

    def plan(self, batch_id: int) -> Planned:
        """See Source. Spark lists more than is read: what `reason_of` names is left out, and `adtally status` counts it.

        Raises LandingPathError for a file that lies in no folder of the stream.
        """
        planned = read_batch_files(self.checkpoint, batch_id, self._place)
        landing = self._settings.landing_path
        taken = [file for file in planned.files if reason_of(landing, relative_name(file.path, landing)) is None]
        return Planned(planned.planned_us, taken)

    def has_records(self, batch_id: int) -> bool:
        """See Source."""
        offsets = self.checkpoint / "offsets"
        if not (offsets / str(batch_id)).exists() or (batch_id and not (offsets / str(batch_id - 1)).exists()):
            return False
        return bool(self.plan(batch_id).files)

    def splits(self, planned: Planned) -> list[Split]:
        """See Source."""
        files = [replace(file, path=self._place(file.path)) for file in planned.files]
        return plan_splits(files, self._settings.landing_path, self._settings.split_bytes)

    def _place(self, path: str) -> str:
        """Where a file lies that a checkpoint or a commit calls so."""
        landing = self._settings.landing_path
        return f"{landing}/{name_below(path, landing, self.name)}"


def _escape_glob(text: str) -> str:
    return "".join(f"\\{character}" if character in "*?[]{}\\" else character for character in text)
