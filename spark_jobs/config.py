"""Settings: one frozen object, read from ``ADTALLY_*`` environment variables and refused at the start when wrong."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from spark_jobs.errors import ConfigurationError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST = timedelta(days=36_500)


class Settings(BaseSettings):
    """Where everything lies and by which limits events are judged.

    Durations take ISO 8601 (``PT15M``) or seconds. Times are RFC 3339 with a zone. An empty variable counts as not set.
    """

    model_config = SettingsConfigDict(env_prefix="ADTALLY_", env_ignore_empty=True, frozen=True, extra="ignore")

    home: Annotated[Path, Field(description="Folder that holds everything of one installation.")] = Path(".adtally")
    lakehouse: Annotated[
        str | None,
        Field(description="Root of the Delta tables: a path or a URI such as s3a://. Default: HOME/lakehouse."),
    ] = None
    landing: Annotated[Path | None, Field(description="Root of the landing folders. Default: HOME/landing.")] = None
    cache_dir: Annotated[
        Path | None, Field(description="Jars resolved once for all installations. Default: the user's cache folder.")
    ] = None
    spark_master: Annotated[str, Field(description="Spark master URL.")] = "local[*]"
    driver_memory: Annotated[str, Field(pattern=r"^\d+[mg]$", description="Heap of the Spark driver, as 1536m or 2g.")] = "1536m"
    shuffle_partitions: Annotated[int, Field(ge=1, le=10_000, description="Partitions of a shuffle.")] = 2
    max_bytes_per_batch: Annotated[
        int,
        Field(ge=1024, description="Bytes of landing files (as stored) taken into one micro-batch; at least one file is."),
    ] = 384 * 1024 * 1024
    max_files_per_batch: Annotated[
        int | None, Field(ge=1, description="Landing files taken into one micro-batch, instead of max_bytes_per_batch.")
    ] = None
    split_bytes: Annotated[int, Field(ge=4096, description="Bytes of a plain file that one task parses at a time.")] = (
        16 * 1024 * 1024
    )
    future_skew: Annotated[
        timedelta, Field(ge=timedelta(0), le=_LONGEST, description="How far event_time may lie after received_at.")
    ] = timedelta(minutes=5)
    hour_grace: Annotated[
        timedelta,
        Field(
            ge=timedelta(0), le=_LONGEST, description="An event received this long after the end of its hour, or later, is late."
        ),
    ] = timedelta(minutes=15)
    earliest_event_time: Annotated[
        datetime, Field(description="Events and orders before this time are rejected as out of range. Not before 1970.")
    ] = datetime(2000, 1, 1, tzinfo=UTC)

    @field_validator("future_skew", "hour_grace", mode="before")
    @classmethod
    def _seconds(cls, value: object) -> object:
        return float(value) if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) else value

    @field_validator("earliest_event_time", mode="before")
    @classmethod
    def _no_number(cls, value: object) -> object:
        if isinstance(value, str) and "-" not in value:  # a year alone would be taken for seconds since 1970
            raise ValueError("is not an RFC 3339 time, as in 2000-01-01T00:00:00Z")
        return value

    @field_validator("earliest_event_time")
    @classmethod
    def _zone_required(cls, value: datetime) -> datetime:
        if value.tzinfo is None:
            raise ValueError("needs a zone, as in 2000-01-01T00:00:00Z")
        try:
            value = value.astimezone(UTC)
        except OverflowError:
            raise ValueError("is not within the years 1 to 9999 in UTC") from None
        if value < _EPOCH:  # minutes, hours and dates are counted from there
            raise ValueError("must not be before 1970-01-01T00:00:00Z")
        return value

    @cached_property
    def home_path(self) -> Path:
        """ADTALLY_HOME as an absolute path."""
        return self.home.expanduser().absolute()

    @cached_property
    def lakehouse_uri(self) -> str:
        """Root of the Delta tables, absolute when it is a path."""
        if self.lakehouse is None:
            return str(self.home_path / "lakehouse")
        return self.lakehouse.rstrip("/") if "://" in self.lakehouse else str(Path(self.lakehouse).expanduser().absolute())

    @cached_property
    def landing_path(self) -> Path:
        """Root of the landing folders, absolute."""
        return (self.landing or self.home_path / "landing").expanduser().absolute()

    @cached_property
    def checkpoints_path(self) -> Path:
        """Checkpoints of the streaming queries, a folder each."""
        return self.home_path / "checkpoints"

    @cached_property
    def marts_path(self) -> Path:
        """The published DuckDB file."""
        return self.home_path / "marts" / "marts.duckdb"

    @cached_property
    def scratch_path(self) -> Path:
        """Working files that may be deleted whenever no command runs."""
        return self.home_path / "scratch"

    @cached_property
    def key_index_path(self) -> Path:
        """The key index of `events`: derived from the table, rebuilt from it when missing."""
        return self.home_path / "key_index"

    @cached_property
    def jar_cache_path(self) -> Path:
        """Folder of the resolved jars."""
        base = self.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "adtally"
        return Path(base).expanduser().absolute() / "jars"

    def table_uri(self, name: str) -> str:
        """Path of a Delta table of the registry."""
        return f"{self.lakehouse_uri}/{name}"


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, with overrides.

    Raises ConfigurationError that names each wrong setting on one line.
    """
    try:
        return Settings(**{k: v for k, v in overrides.items() if v is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(
            f"ADTALLY_{'.'.join(str(part) for part in item['loc']).upper()}: {item['msg']}" for item in error.errors()
        )
        raise ConfigurationError(f"wrong settings: {problems}", hint="correct the environment variable or the option") from None
