"""Settings: one frozen object, read from ``ADTALLY_*`` environment variables and refused at the start when wrong."""

from __future__ import annotations

import difflib
import os
import re
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from spark_jobs.errors import ConfigurationError
from spark_jobs.lake.locations import canonical, canonical_path, local_folder, state_root, unusable_character
from spark_jobs.units import EPOCH

_LONGEST = timedelta(days=36_500)


def _seconds(value: object) -> object:
    return float(value) if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) else value


def _split(value: object) -> object:
    return tuple(part for part in (p.strip() for p in value.split(",")) if part) if isinstance(value, str) else value


def _refuse_number(value: object) -> object:
    if isinstance(value, str) and "-" not in value:  # pydantic would read a year alone as seconds since 1970
        raise ValueError("is not an RFC 3339 time, as in 2000-01-01T00:00:00Z")
    return value


def _to_utc(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("needs a zone, as in 2000-01-01T00:00:00Z")
    try:
        value = value.astimezone(UTC)
    except OverflowError:
        raise ValueError("is not within the years 1 to 9999 in UTC") from None
    if value < EPOCH:  # minutes, hours and dates are counted from the epoch
        raise ValueError("must not be before 1970-01-01T00:00:00Z")
    return value


Duration = Annotated[timedelta, Field(ge=timedelta(0), le=_LONGEST), BeforeValidator(_seconds)]
PositiveDuration = Annotated[timedelta, Field(gt=timedelta(0), le=_LONGEST), BeforeValidator(_seconds)]
Moment = Annotated[datetime, BeforeValidator(_refuse_number), AfterValidator(_to_utc)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Share = Annotated[float, Field(gt=0, le=1)]
Size = Annotated[str, Field(pattern=r"^[1-9]\d*[mg]$")]


class Settings(BaseSettings):
    """The paths of an installation, and the limits by which it judges events.

    Durations take ISO 8601 (``PT15M``) or seconds. Times are RFC 3339 with a zone. An empty variable counts as not set.
    """

    model_config = SettingsConfigDict(env_prefix="ADTALLY_", env_ignore_empty=True, frozen=True, extra="ignore")

    home: Path = Field(Path(".adtally"), description="Folder that holds everything of one installation.")
    lakehouse: str | None = Field(
        None, description="Root of the Delta tables: a path or a URI such as s3://bucket/prefix. Default: HOME/lakehouse."
    )
    landing: str | Path | None = Field(
        None, description="Root of the landing folders: a path or a URI such as s3://. Default: HOME/landing."
    )
    landing_sweep: PositiveDuration = Field(
        timedelta(minutes=1),
        description="How often a landing folder in an object store is listed whole; new keys at its end are found at each trigger.",
    )
    rules: str | Path | None = Field(
        None,
        description="Folder of invalid_traffic.toml and attribution.toml, a path or a URI; ours where one is missing. "
        "Default: HOME/rules.",
    )
    kafka: Path | None = Field(
        None, description="The Kafka clusters, as docs/kafka.md says. Default: HOME/kafka.toml, where there is one."
    )
    cache_dir: Path | None = Field(None, description="Jars resolved once for all installations. Default: the user's cache folder.")
    spark_master: str = Field("local[*]", description="Spark master URL.")
    driver_memory: str = Field("1536m", pattern=r"^\d+[mg]$", description="Heap of the Spark driver, as 1536m or 2g.")
    shuffle_partitions: int = Field(2, ge=1, le=10_000, description="Partitions of a shuffle.")
    max_bytes_per_batch: int = Field(
        384 * 1024 * 1024,
        ge=1024,
        description="Bytes of landing files (as stored) taken into one micro-batch; at least one file is.",
    )
    max_files_per_batch: int | None = Field(
        None, ge=1, description="Landing files taken into one micro-batch, instead of max_bytes_per_batch."
    )
    split_bytes: int = Field(16 * 1024 * 1024, ge=4096, description="Bytes of a plain file that one task parses at a time.")
    batch_timeout: PositiveDuration = Field(
        timedelta(minutes=5), description="The workers of a batch that makes no progress for so long are ended."
    )
    max_reject_rows: int = Field(
        1000,
        ge=1,
        description="Rejected records of a file with the same reasons and hour that get a row each; a further row counts.",
    )
    max_rejects_per_file: int = Field(
        1_000_000,
        ge=1,
        description="A landing file with more rejects is quarantined, if they are max_rejects_per_file_share of it.",
    )
    max_rejects_per_file_share: float = Field(
        0.95, ge=0, le=1, description="The share of rejects above which max_rejects_per_file quarantines a landing file."
    )
    max_gzip_ratio: int = Field(
        250, ge=1, description="A gzip file that unpacks to over 1 GiB and this many times its size is quarantined."
    )
    future_skew: Duration = Field(timedelta(minutes=5), description="How far event_time may lie after received_at.")
    hour_grace: Duration = Field(
        timedelta(minutes=15), description="An event received this long after the end of its hour, or later, is late."
    )
    silent_after: PositiveDuration = Field(
        timedelta(hours=1), description="A source this far behind the most advanced one is called silent."
    )
    retired_sources: Names = Field(
        (), description="Sources that closing an hour no longer waits for, as events/eu-west,orders/eu-west."
    )
    vacuum_retention: Duration = Field(
        timedelta(days=7), description="Data files that no version of this age or younger needs may be vacuumed."
    )
    erasure_key_file: Path | None = Field(
        None,
        description="The key of the suppression list of erased people: a file of 32 bytes or more that only its owner can read, "
        "the same on every machine. Default: LAKEHOUSE/_adtally/erasure/key.",
    )
    erasure_days: int = Field(30, ge=1, le=3650, description="Days within which a queued request to erase a person must be done.")
    raw_retention: int | None = Field(
        None,
        ge=1,
        description="Days after which landing files and raw copies of topics are archived or dropped, once recounted and billed. "
        "Default: all are kept.",
    )
    raw_archive: str | Path | None = Field(
        None, description="Where raw input older than raw_retention is moved: a path or a URI. Default: it is dropped."
    )
    compacted_file_bytes: int = Field(
        128 * 1024 * 1024, ge=1024 * 1024, description="Size that compaction aims at for a data file, in bytes."
    )
    start_date: Moment | None = Field(
        None, description="First hourly partition in Dagster. Default: the day of the first accepted event, else today."
    )
    webserver_port: int = Field(3000, ge=0, le=65535, description="Port of the Dagster UI on 127.0.0.1; 0 takes a free one.")
    webserver_hosts: Names = Field(
        (), description="Names beside the loopback address by which browsers may call the Dagster UI and the console."
    )
    webserver_token: SecretStr | None = Field(
        None, min_length=16, description="What every request to the Dagster UI must have: ?token=... once a browser."
    )
    console_port: int = Field(3001, ge=0, le=65535, description="Port of the console on 127.0.0.1; 0 takes a free one.")
    console_token: SecretStr | None = Field(
        None, min_length=16, description="What every request to the console must have: ?token=... once a browser."
    )
    webserver_url: str | None = Field(
        None, pattern="^https?://", description="Where browsers find the Dagster UI, for links; `adtally up` sets it."
    )
    dagster_storage: SecretStr | None = Field(
        None,
        description="Postgres that keeps Dagster's runs and schedules for several machines, as SQLAlchemy names it: "
        "postgresql+psycopg2://user:password@host/name. Default: SQLite files in HOME/dagster.",
    )
    marts_interval: Duration | None = Field(
        None,
        description="Shortest time between the begins of two builds of the near-real-time marts by `adtally up`; 0 leaves them to "
        "Dagster's schedule. Default: 3 s, a minute with a lakehouse in an object store.",
    )
    query_memory: Size = Field("1g", description="Memory of a query of the marts, as 512m or 2g.")
    query_spill: Size = Field("4g", description="Disk space that a query of the marts may take beyond its memory.")
    query_timeout: PositiveDuration = Field(timedelta(minutes=2), description="A query of the marts that takes longer is ended.")
    reports_url: str | None = Field(
        None, pattern="^https?://", description="Where data docs and runbooks are served, for links; `adtally up` sets it."
    )
    alert_webhook: SecretStr | None = Field(None, description="URL that alerts are posted to as JSON, beside the log.")
    max_stream_lag: PositiveDuration = Field(
        timedelta(minutes=2), description="Alert: landing files older than this wait to be ingested."
    )
    max_mart_age: PositiveDuration = Field(
        timedelta(minutes=15), description="Alert: the published marts lag the ledger by more than this."
    )
    max_publish_lag: PositiveDuration = Field(
        timedelta(minutes=2), description="Alert: Delta versions older than this wait to be published to Kafka."
    )
    max_rejected_share: Share = Field(0.05, description="Alert: rejected share of what was offered in the last hour of ingestion.")
    max_duplicate_share: Share = Field(
        0.25, description="Alert: duplicate share of what was offered in the last hour of ingestion."
    )
    max_user_share: Share = Field(0.2, description="Alert: share of one user in the events of the last hour of ingestion.")
    min_free_bytes: int = Field(2 * 1024**3, ge=0, description="Alert: less free disk space than this under ADTALLY_HOME.")
    lease_seconds: float = Field(
        20.0,
        ge=1,
        le=3600,
        description="With a lakehouse in an object store: a process that has not renewed its lease for so long is replaced.",
    )
    earliest_event_time: Moment = Field(
        datetime(2000, 1, 1, tzinfo=UTC),
        description="Events and orders before this time are rejected as out of range. Not before 1970.",
    )

    @field_validator("retired_sources")
    @classmethod
    def _check_sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"(events|orders)/[a-z0-9-]{1,32}", name):
                raise ValueError(f"{name!r} is not a source, as in events/eu-west")
        return value

    @field_validator("dagster_storage")
    @classmethod
    def _check_storage(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _is_postgres(value.get_secret_value()):
            raise ValueError("is not the address of a Postgres, as in postgresql+psycopg2://user:password@host/name")
        return value

    @field_validator("webserver_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", name):
                raise ValueError(f"{name!r} is not the name of a host, without a port, as in tally.example")
        return value

    @cached_property
    def home_path(self) -> Path:
        """ADTALLY_HOME as an absolute path, without links, ``..`` or ``//``. All paths of the settings are like that."""
        return canonical_path(self.home)

    @cached_property
    def lakehouse_uri(self) -> str:
        """Root of the Delta tables, absolute when it is a path."""
        return canonical(self.lakehouse or self.home_path / "lakehouse")

    @cached_property
    def state_uri(self) -> str:
        """Where state that is no table and cannot be rebuilt is kept: the home, or a folder of a lakehouse in an object store."""
        return state_root(self.home_path, self.lakehouse_uri)

    @cached_property
    def landing_uri(self) -> str:
        """Root of the landing folders, where records are read: absolute when it is a path."""
        return canonical(self.landing or self.home_path / "landing")

    @cached_property
    def landing_path(self) -> Path:
        """Where the landing folders are listed: the root itself or, of an object store, its view (lake/landing_view.py)."""
        return local_folder(self.landing_uri, self.home_path / "landing_view")

    @cached_property
    def raw_archive_uri(self) -> str | None:
        """Where old raw input is moved, absolute when it is a path; None: it is dropped."""
        return None if self.raw_archive is None else canonical(self.raw_archive)

    @cached_property
    def rules_uri(self) -> str:
        """Folder of the rule files, absolute when it is a path."""
        return canonical(self.rules or self.home_path / "rules")

    @cached_property
    def rules_path(self) -> Path:
        """Where the rule files are read: their folder itself or, of an object store, its copy (lake/landing_view.py)."""
        return local_folder(self.rules_uri, self.home_path / "rules_view")

    @cached_property
    def kafka_path(self) -> Path:
        """The file that names the Kafka clusters, absolute."""
        return canonical_path(self.kafka or self.home_path / "kafka.toml")

    @cached_property
    def checkpoints_path(self) -> Path:
        """Checkpoints of the streaming queries, a folder each."""
        return self.home_path / "checkpoints"

    @cached_property
    def checkpoints_view_path(self) -> Path:
        """What other machines read of the checkpoints that a remote lakehouse has copies of. May be deleted at any time."""
        return self.home_path / "checkpoints_view"

    @cached_property
    def marts_path(self) -> Path:
        """The published DuckDB file."""
        return self.home_path / "marts" / "marts.duckdb"

    @cached_property
    def scratch_path(self) -> Path:
        """Working files that may be deleted whenever no command runs."""
        return self.home_path / "scratch"

    @cached_property
    def attempts_path(self) -> Path:
        """Counts of the starts of each query's last batch, a file a query. May be deleted at any time."""
        return self.home_path / "attempts"

    @cached_property
    def recount_path(self) -> Path:
        """Parsed input of the recount: derived from the landing files, rebuilt if missing."""
        return self.home_path / "recount"

    @cached_property
    def quality_path(self) -> Path:
        """Data docs and profiles of the checks."""
        return self.home_path / "quality"

    @cached_property
    def dagster_path(self) -> Path:
        """DAGSTER_HOME of this installation."""
        return self.home_path / "dagster"

    @cached_property
    def key_index_path(self) -> Path:
        """The key index of `events`: derived from the table, rebuilt if missing."""
        return self.home_path / "key_index"

    @cached_property
    def jar_cache_path(self) -> Path:
        """Folder of the resolved jars."""
        base = self.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "adtally"
        return canonical_path(Path(base)) / "jars"

    def table_uri(self, name: str) -> str:
        """Path of a Delta table of the registry."""
        return f"{self.lakehouse_uri}/{name}"


def _is_postgres(address: str) -> bool:
    """Return whether an address can be read in one way only. An error of a misread one could show a part of its password."""
    parts = urlsplit(address)
    try:
        has_host = parts.port is None or parts.hostname is not None
    except ValueError:  # the port is no number: a password with a slash
        return False
    return parts.scheme == "postgresql+psycopg2" and has_host and parts.netloc.count("@") <= 1 and not parts.fragment


# Variables that the crash tests and dbt's profile read.
_OTHER_VARIABLES = ("ADTALLY_CRASH_AT", "ADTALLY_DBT_MARTS_PATH", "ADTALLY_DBT_WORK_PATH")


def _refuse_unknown() -> None:
    known = [f"ADTALLY_{name.upper()}" for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith("ADTALLY_") and name.upper() not in (*known, *_OTHER_VARIABLES) and os.environ[name]:
            near = difflib.get_close_matches(name.upper(), known, 1)
            meant = f"do you mean {near[0]}?" if near else "unset it"
            raise ConfigurationError(f"wrong settings: there is no setting {name}", hint=meant)


def _refuse_paths(settings: Settings) -> None:
    """Raise ConfigurationError if a path has a character with which no table can be opened, or the archive lies in the landing."""
    archive = settings.raw_archive_uri
    if archive is not None and f"{archive}/".startswith((f"{settings.landing_uri}/", f"{settings.lakehouse_uri}/")):
        raise ConfigurationError(
            "wrong settings: ADTALLY_RAW_ARCHIVE lies in the landing folder or the lakehouse", hint="name a place outside both"
        )
    for variable, path in (("ADTALLY_HOME", str(settings.home_path)), ("ADTALLY_LAKEHOUSE", settings.lakehouse_uri)):
        found = unusable_character(path)
        if found is not None:
            raise ConfigurationError(
                f"wrong settings: {variable}: {path!r} has the character {found!r}, with which tables cannot be opened",
                hint="choose a folder without [ ] \\ | ^ % and control characters in its path",
            )


def load_settings(**overrides: object) -> Settings:
    """Read the settings from the environment, with overrides.

    Raises ConfigurationError, which names on one line each wrong setting, or an ADTALLY_ variable without a setting.
    """
    _refuse_unknown()
    try:
        made = Settings(**{k: v for k, v in overrides.items() if v is not None})  # type: ignore[arg-type]
        _refuse_paths(made)
        return made
    except ValidationError as error:
        problems = "; ".join(f"ADTALLY_{'.'.join(map(str, item['loc'])).upper()}: {item['msg']}" for item in error.errors())
        raise ConfigurationError(f"wrong settings: {problems}", hint="correct the environment variable or the option") from None
