"""The input contract as data. Both validators are generated from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

MAX_LINE_BYTES = 64 * 1024
MAX_RAW_BYTES = 1024 * 1024
# the years 1 to 9999 in UTC: what every reader of the tables can hold
EARLIEST_US = -62_135_596_800_000_000
LATEST_US = 253_402_300_799_999_999

# ISO 4217 active codes. XXX (no currency) and XTS (testing) are no money and are left out.
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


class Kind(StrEnum):
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
    """One field. ``default`` stands in for an absent or null optional integer."""

    name: str
    kind: Kind
    required: bool = True
    values: tuple[str, ...] = ()
    high: int = 0
    default: int | None = None


@dataclass(frozen=True)
class Contract:
    """A record type. ``payload`` are the fields of the fingerprint, in order: all but the id, received_at and region."""

    stream: str
    id_field: str
    time_field: str
    fields: tuple[Field, ...]

    @property
    def payload(self) -> tuple[Field, ...]:
        """The fields that the fingerprint covers."""
        return tuple(f for f in self.fields if f.name not in (self.id_field, "received_at", "region"))


EVENT_CONTRACT = Contract(
    stream="events",
    id_field="event_id",
    time_field="event_time",
    fields=(
        Field("event_id", Kind.ID),
        Field("event_type", Kind.ENUM, values=("impression", "click")),
        Field("event_time", Kind.TIME),
        Field("received_at", Kind.TIME, required=False),
        Field("region", Kind.REGION, required=False),
        Field("campaign_id", Kind.ID),
        Field("ad_id", Kind.ID),
        Field("store_id", Kind.ID),
        Field("user_id", Kind.ID),
        Field("impression_id", Kind.TEXT, required=False),
        Field("placement", Kind.TEXT, required=False),
        Field("price_micros", Kind.INTEGER, required=False, high=10**12, default=0),
        Field("currency", Kind.CURRENCY),
        Field("user_agent", Kind.TEXT, required=False),
    ),
)

ORDER_CONTRACT = Contract(
    stream="orders",
    id_field="order_id",
    time_field="order_time",
    fields=(
        Field("order_id", Kind.ID),
        Field("order_time", Kind.TIME),
        Field("received_at", Kind.TIME, required=False),
        Field("region", Kind.REGION, required=False),
        Field("user_id", Kind.ID),
        Field("store_id", Kind.ID),
        Field("total_micros", Kind.INTEGER, high=10**15),
        Field("currency", Kind.CURRENCY),
        Field("status", Kind.ENUM, values=("placed", "cancelled")),
    ),
)

CONTRACTS = {contract.stream: contract for contract in (EVENT_CONTRACT, ORDER_CONTRACT)}


@dataclass(frozen=True)
class Limits:
    """By what the records of one batch are judged, fixed when the batch is first tried.

    All times are microseconds since the epoch, durations microseconds. ``ingested_us`` stands in for an absent received_at.
    ``rejects_kept``: so many rejected records of a file get rows of their own, per reasons and event hour (None: all).
    """

    ingested_us: int
    earliest_us: int
    future_skew_us: int
    hour_grace_us: int
    rejects_kept: int | None = None
