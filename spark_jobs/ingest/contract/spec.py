"""The input contract as data, from which both validators, the staged columns, the columns of `events` and the fingerprint derive.

A new optional text field takes a line here, and its column in `lake/tables.py` with its meaning in `lake/columns.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

MAX_LINE_BYTES = 64 * 1024
MAX_RAW_BYTES = 1024 * 1024
# the years 1 to 9999 in UTC, which every reader of the tables can represent
EARLIEST_US = -62_135_596_800_000_000
LATEST_US = 253_402_300_799_999_999

# The active codes of ISO 4217, without XXX (no currency) and XTS (testing), which are no money.
_CODES = """
AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF
CHW CLF CLP CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL
HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD
MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF
SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD USN UYI UYU
UYW UZS VED VES VND VUV WST XAF XAG XAU XCD XCG XOF XPD XPF XPT XSU XUA YER ZAR ZMW ZWG
"""
CURRENCIES = frozenset(_CODES.split())
REGION_FORM = re.compile(r"[a-z0-9-]{1,32}", flags=re.ASCII)


class FieldKind(StrEnum):
    """What a field's value must be."""

    ID = "id"  # a string of 1 to 128 characters
    TEXT = "text"  # any string
    ENUM = "enum"  # one of `values`
    CURRENCY = "currency"  # ISO 4217
    INTEGER = "integer"  # 0 to `high`
    TIME = "time"  # RFC 3339 with a zone, to the microsecond
    REGION = "region"  # 1-32 of [a-z0-9-], equal to the folder's


@dataclass(frozen=True)
class Field:
    """One field. ``default`` replaces an absent or null optional integer."""

    name: str
    kind: FieldKind
    required: bool = True
    values: tuple[str, ...] = ()
    high: int = 0
    default: int | None = None


@dataclass(frozen=True)
class Contract:
    """A record type and its fields, in order."""

    stream: str
    id_field: str
    time_field: str
    fields: tuple[Field, ...]

    @property
    def payload(self) -> tuple[Field, ...]:
        """The fields that the fingerprint covers, in order: all but the id, received_at and region."""
        return tuple(f for f in self.fields if f.name not in (self.id_field, "received_at", "region"))


EVENT_CONTRACT = Contract(
    stream="events",
    id_field="event_id",
    time_field="event_time",
    fields=(
        Field("event_id", FieldKind.ID),
        Field("event_type", FieldKind.ENUM, values=("impression", "click")),
        Field("event_time", FieldKind.TIME),
        Field("received_at", FieldKind.TIME, required=False),
        Field("region", FieldKind.REGION, required=False),
        Field("campaign_id", FieldKind.ID),
        Field("ad_id", FieldKind.ID),
        Field("store_id", FieldKind.ID),
        Field("user_id", FieldKind.ID),
        Field("impression_id", FieldKind.TEXT, required=False),
        Field("placement", FieldKind.TEXT, required=False),
        Field("price_micros", FieldKind.INTEGER, required=False, high=10**12, default=0),
        Field("currency", FieldKind.CURRENCY),
        Field("user_agent", FieldKind.TEXT, required=False),
    ),
)

ORDER_CONTRACT = Contract(
    stream="orders",
    id_field="order_id",
    time_field="order_time",
    fields=(
        Field("order_id", FieldKind.ID),
        Field("order_time", FieldKind.TIME),
        Field("received_at", FieldKind.TIME, required=False),
        Field("region", FieldKind.REGION, required=False),
        Field("user_id", FieldKind.ID),
        Field("store_id", FieldKind.ID),
        Field("total_micros", FieldKind.INTEGER, high=10**15),
        Field("currency", FieldKind.CURRENCY),
        Field("status", FieldKind.ENUM, values=("placed", "cancelled")),
    ),
)

CONTRACTS = {contract.stream: contract for contract in (EVENT_CONTRACT, ORDER_CONTRACT)}


@dataclass(frozen=True)
class BatchLimits:
    """The limits that judge the records of one batch, fixed at its first attempt: microseconds, or microseconds since the epoch.

    ``ingested_us`` replaces an absent received_at. At most ``rejects_kept`` rejected records of a file, for each event hour and the
    same reasons, get a row each (None: all).
    """

    ingested_us: int
    earliest_us: int
    future_skew_us: int
    hour_grace_us: int
    rejects_kept: int | None = None
