"""Load campaigns from the CSV files of the landing folder into table `campaigns`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.errors import CampaignFileError
from spark_jobs.ingest.contract.exact import parse_time
from spark_jobs.ingest.contract.spec import CURRENCIES
from spark_jobs.ingest.csv_rows import Row, read_rows
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA
from spark_jobs.ingest.files.landing import csv_files, open_regular
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.landing_view import CAMPAIGNS_FOLDER
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import CAMPAIGNS
from spark_jobs.steps import Step
from spark_jobs.units import from_micros

COLUMNS = ("campaign_id", "store_id", "billing_model", "daily_budget_micros", "currency", "valid_from", "valid_to")


@dataclass(frozen=True, order=True)
class Campaign:
    """A campaign in one range of validity: times in microseconds since the epoch, valid_to exclusive (None: open)."""

    campaign_id: str
    valid_from_us: int
    store_id: str
    billing_model: str
    daily_budget_micros: int
    currency: str
    valid_to_us: int | None
    source_file: str


def _time(text: str, where: str, column: str) -> int:
    micros, problem = parse_time(text if "T" in text.upper() else f"{text}T00:00:00Z")
    if problem or micros is None:
        raise CampaignFileError(f"{where}: {column} is not an RFC 3339 time with a zone or a date: {text!r}")
    return micros


def _campaign(row: Row, where: str, source_file: str) -> Campaign:
    def text(column: str) -> str:
        value = (row.get(column) or "").strip()
        if not 1 <= len(value) <= 128:
            raise CampaignFileError(f"{where}: {column} must have 1 to 128 characters")
        return value

    budget = text("daily_budget_micros")
    if not (budget.isascii() and budget.isdigit()) or int(budget) > 10**18:
        raise CampaignFileError(f"{where}: daily_budget_micros is not a whole number of 0 to 10^18: {budget!r}")
    if text("billing_model") not in ("cpc", "cpm"):
        raise CampaignFileError(f"{where}: billing_model must be cpc or cpm, not {text('billing_model')!r}")
    if text("currency") not in CURRENCIES:
        raise CampaignFileError(f"{where}: currency is not an ISO 4217 code: {text('currency')!r}")
    campaign_id = text("campaign_id")
    start = _time(text("valid_from"), where, "valid_from")
    store_id = text("store_id")
    end = _time(text("valid_to"), where, "valid_to") if (row.get("valid_to") or "").strip() else None
    if end is not None and end <= start:
        raise CampaignFileError(f"{where}: valid_to is not after valid_from")
    return Campaign(campaign_id, start, store_id, text("billing_model"), int(budget), text("currency"), end, source_file)


def read_campaigns(landing: Path) -> list[Campaign]:
    """Read the campaigns of ``<landing>/campaigns/*.csv``, sorted. The same row in two files counts once.

    Raises CampaignFileError with the file, the line and the rule; ranges of one campaign must not overlap.
    """
    found: dict[tuple[object, ...], tuple[Campaign, str]] = {}
    for name, where, row in read_rows(landing, CAMPAIGNS_FOLDER, COLUMNS, CampaignFileError, _refuse_repeated_columns):
        if None in row:
            raise CampaignFileError(f"{where}: more values than columns")
        campaign = _campaign(row, where, name)
        found.setdefault(astuple(campaign)[:-1], (campaign, where))
    placed = sorted(found.values(), key=lambda p: (p[0].campaign_id, p[0].valid_from_us))
    for (earlier, there), (later, here) in pairwise(placed):
        if earlier.campaign_id == later.campaign_id and (earlier.valid_to_us is None or earlier.valid_to_us > later.valid_from_us):
            raise CampaignFileError(
                f"{here}: the range of campaign {later.campaign_id} overlaps that of {there} at "
                f"{from_micros(later.valid_from_us).isoformat()}",
                hint="end the earlier range (valid_to is exclusive) before the next begins",
            )
    return [campaign for campaign, _ in placed]


def _refuse_repeated_columns(name: str, header: Sequence[str]) -> None:
    """Raise CampaignFileError if a column occurs twice, also with other capitals, blanks or a byte order mark.

    It would be chance which of the two a reader takes. Columns without a name, as spreadsheets add them, may repeat.
    """
    plain = [column.replace("\ufeff", "").strip().casefold() for column in header]
    for at, column in enumerate(plain):
        if column and column in plain[:at]:
            first = header[plain.index(column)]
            other = "" if first == header[at] else f" (as {first!r} and {header[at]!r})"
            raise CampaignFileError(f"{name}: column {column} is there twice{other}", hint="keep one of them")


def campaign_contents(landing: Path) -> str | None:
    """Return a hash of the names and bytes of the campaign files; None if one cannot be read."""
    hasher = hashlib.sha256()
    try:
        for name in csv_files(landing, CAMPAIGNS_FOLDER):
            with open_regular(landing / name, depth=2) as file:
                data = file.read()
            hasher.update(f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape") + data)
    except OSError:
        return None
    return hasher.hexdigest()


def load_campaigns(settings: Settings) -> int | None:
    """Replace table `campaigns` by the content of the CSV files, if there are any and it is new; return the table's version."""
    log = DeltaLog(settings.table_uri(CAMPAIGNS.name))
    campaigns = read_campaigns(settings.landing_path)
    digest = hashlib.sha256(json.dumps([astuple(c) for c in campaigns]).encode()).hexdigest()
    if campaigns and (log.newest_metadata() or {}).get("campaigns_sha256") != digest:
        rows = [asdict(c) | {"valid_from": c.valid_from_us, "valid_to": c.valid_to_us} for c in campaigns]
        table = pa.Table.from_pylist(rows, CAMPAIGNS.schema)
        Lake(settings).replace(CAMPAIGNS, table, Step.CAMPAIGNS, metadata={"campaigns_sha256": digest})
    return log.latest_version()


def prices_in_force(settings: Settings) -> int | None:
    """Return the version of table `campaigns` whose prices apply; None if no campaign was ever loaded."""
    snapshot = Lake(settings).pin(CAMPAIGNS)
    return snapshot.version(CAMPAIGNS) if CAMPAIGNS in snapshot and snapshot.files(CAMPAIGNS) else None


def campaigns_at(settings: Settings, version: int) -> pa.Table:
    """Return the price list (CAMPAIGN_SCHEMA) of one version of table `campaigns`."""
    columns = ("campaign_id", "billing_model", "valid_from", "valid_to")
    rows = Lake(settings).at({CAMPAIGNS.name: version}).rows(CAMPAIGNS, *columns)
    return rows.select(columns).rename_columns(CAMPAIGN_SCHEMA.names).cast(CAMPAIGN_SCHEMA)
