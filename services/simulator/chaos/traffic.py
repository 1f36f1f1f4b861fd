"""Landing files of traffic in which all that can go wrong is frequent, made from a seed."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from services.simulator.chaos.oracle import LINE_BYTES, Landed

_MICROSECOND = timedelta(microseconds=1)

CAMPAIGNS = """campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to
c-cpm,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,
c-cpc,s-1,cpc,1000000,EUR,2000-01-01T00:00:00Z,
c-both,s-2,cpc,1000000,USD,2025-06-02T09:00:00Z,2025-06-02T11:00:00Z
c-both,s-2,cpm,1000000,USD,2025-06-02T11:00:00Z,2025-06-03T01:01:00+02:00
"""


@dataclass(frozen=True)
class Shape:
    """An example, whole: the same shape makes the same files."""

    seed: int
    records: int
    event_files: int
    order_files: int
    runs: int
    files_per_batch: int
    split_bytes: int
    reviews: bool = False


REGIONS = ("eu-west", "us-east", "ap-1")
TEXTS = ("top", "", "é", "e\u0301", "\U0001f600", "\x1f", "\x01", "-", "1:x", "a\u2028b", '"', "\\", "\x00", " top ", "null")
# impression_id and placement that are one text where a separator is not told from data, or nothing from a mark for it
TWINS: dict[tuple[str | None, str | None], tuple[str | None, str | None]] = {
    (None, "x"): ("\x01", "x"),
    ("\x01", "x"): (None, "x"),
    ("e1\x1f", ""): ("e1", "\x1f"),
    ("e1", "\x1f"): ("e1\x1f", ""),
}
# when a range of campaign c-both begins or ends
TURNS = [datetime(2025, 6, 2, hour, minute, tzinfo=UTC) for hour, minute in ((9, 0), (11, 0), (23, 1))]
NAMES = ("part-{}.jsonl", "{}.jsonl.gz", "b {}.jsonl", "ü%20{}.jsonl.gz", "[{}].jsonl", "x+{}=y.jsonl", "{}#?.jsonl")
BAD_TIMES = (
    "2025-06-02T10:00:00",
    "2025-06-02 10:00:00Z",
    "2025-06-02T10:00:00.0000001Z",
    "2025-06-31T10:00:00Z",
    "2025-06-02T24:00:00Z",
    "2025-06-02T10:00:60Z",
    "2025-06-02T10:00:00+24:00",
    "2025-06-02T10:00Z",
    "2025-06-02",
    " 2025-06-02T10:00:00Z",
    "1970-01-01T00:00:00Z",
    "1999-12-31T23:59:59.999999Z",
    "",
    "now",
    1748858400,
    True,
)
OTHER_TYPES: tuple[Any, ...] = (5, 0, 1.5, True, [], ["x"], {}, {"a": "b"})
REQUIRED = {
    "events": ("event_id", "event_type", "event_time", "campaign_id", "ad_id", "store_id", "user_id", "currency"),
    "orders": ("order_id", "order_time", "user_id", "store_id", "total_micros", "currency", "status"),
}
Change = Callable[[dict[str, Any]], None]


@dataclass
class File:
    """A landing file in the making.

    A tidy one has valid lines, and lines of the right form with a wrong value: what a reader of whole blocks can take. One bad
    line in a block may send all of it another way.
    """

    name: str
    run: int
    tidy: bool
    lines: list[bytes] = field(default_factory=list)

    @property
    def stream(self) -> str:
        """The stream that reads the file."""
        return self.name.split("/")[0]

    @property
    def region(self) -> str:
        """The region that the folder names."""
        return self.name.split("/")[1]


class Traffic:
    """Landing files of a shape, run by run."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.rng = random.Random(repr(shape))
        self.known: dict[str, list[dict[str, Any]]] = {"events": [], "orders": []}

    def runs(self) -> list[list[Landed]]:
        """The files of each run. Files with one time of modification only where they are sure to share a batch."""
        rng, shape = self.rng, self.shape
        landed: list[list[Landed]] = [[] for _ in range(shape.runs)]
        for stream, count, records in (
            ("events", shape.event_files, shape.records),
            ("orders", shape.order_files, max(12, shape.records // 4)),
        ):
            files = [self._file(stream, number) for number in range(count)]
            for _ in range(records):
                file = rng.choice(files)
                file.lines.append(self._line(file))
            if shape.files_per_batch >= count:
                moments = [rng.randrange(3) for _ in files]
            else:
                moments = rng.sample(range(rng.choice((count, 5_000_000))), count)
            for file, moment in zip(files, moments, strict=True):
                landed[file.run].append(Landed(file.name, self._stored(file), 1_700_000_000_000 + moment))
        return landed

    def landing(self, step: int, records: int, first_ms: int) -> list[Landed]:
        """Return the files that a step of a history lands, one with a later time of modification than the other.

        The step's number alone decides what is in them, whatever landed before. They send records of the history's common past
        again, as they were or changed, so any two steps have duplicates and conflicts of each other.
        """
        self.rng = random.Random(f"{self.shape.seed} past")
        self.known = {"events": [], "orders": []}
        for _ in range(40):
            self.known["events"].append(self._event())
        for _ in range(10):
            self.known["orders"].append(self._order())
        self.rng = random.Random(f"{self.shape.seed} step {step}")
        files = [self._file("events", f"{step}-{number}") for number in range(self.rng.randrange(1, 4))]
        files += [self._file("orders", f"{step}-{number}") for number in range(self.rng.randrange(3))]
        for _ in range(records):
            file = self.rng.choice(files)
            file.lines.append(self._line(file))
        self.rng.shuffle(files)
        return [Landed(file.name, self._stored(file), first_ms + 1000 * number) for number, file in enumerate(files)]

    def _file(self, stream: str, number: int | str) -> File:
        rng = self.rng
        region = "EU_West" if rng.random() < 0.06 else rng.choice(REGIONS[: 2 + self.shape.seed % 2])
        name = rng.choice(NAMES[:2] if rng.random() < 0.6 else NAMES).format(number)
        return File(f"{stream}/{region}/{name}", rng.randrange(self.shape.runs), rng.random() < 0.5)

    def _stored(self, file: File) -> bytes:
        rng = self.rng
        rng.shuffle(file.lines)
        data = b"".join(line + b"\n" for line in file.lines)
        if data and rng.random() < 0.2:
            data = data[:-1]  # the last line has no end
        if not file.name.endswith(".gz"):
            return data
        middle = rng.randrange(len(data) + 1)
        members = [data] if rng.random() < 0.7 else [data[:middle], b"", data[middle:]]
        stored = b"".join(gzip.compress(member, mtime=0) for member in members)
        match rng.randrange(10):
            case 0:
                return stored[: rng.randrange(len(stored))]
            case 1:
                return data if data[:1] == b"{" else stored  # no gzip at all
            case _:
                return stored

    # --- lines

    def _line(self, file: File) -> bytes:
        rng = self.rng
        record = self._event() if file.stream == "events" else self._order()
        self.known[file.stream].append(record)
        fate = rng.random()
        shown = self._shown(record, file)
        if fate < 0.12:
            (self._misjudge if file.tidy else self._spoil)(file.stream, shown)
        line = self._json(shown)
        return self._break(line) if 0.12 <= fate < 0.19 and not file.tidy else line

    def _moment(self) -> datetime:
        rng = self.rng
        hour = rng.choice((9, 10, 10, 10, 11, 23))
        second = timedelta(seconds=rng.choice((0, 30, 59)), microseconds=rng.choice((0, 0, 500_000, 999_999)))
        return datetime(2025, 6, 2, hour, rng.choice((0, 1, 59)), tzinfo=UTC) + second

    def _received(self, moment: datetime) -> datetime | None:
        rng = self.rng
        closes = moment.replace(minute=0, second=0, microsecond=0) + timedelta(minutes=75)
        match rng.randrange(12):
            case 0:
                return closes  # late, just
            case 1:
                return closes - _MICROSECOND
            case 2:
                return moment + timedelta(days=rng.randrange(1, 40))
            case 3:
                return moment - timedelta(minutes=5)
            case 4:
                return moment - timedelta(minutes=5) - _MICROSECOND  # of the future, just
            case 5:
                return None
            case _:
                return moment + timedelta(seconds=2)

    def _texts(self) -> tuple[str | None, str | None]:
        """impression_id and placement."""
        rng = self.rng
        if rng.random() < 0.25:
            return rng.choice(list(TWINS))
        return rng.choice((None, None, "e1", "")), None if rng.random() < 0.4 else rng.choice(TEXTS)

    def _event(self) -> dict[str, Any]:
        rng, known = self.rng, self.known["events"]
        if not known or rng.random() < 0.4:
            moment = self._moment()
            if rng.random() < 0.04:
                moment = moment.replace(year=2999)
            elif rng.random() < 0.15:
                moment = rng.choice(TURNS) - rng.choice((0, 0, 1)) * _MICROSECOND
            impression, placement = self._texts()
            return {
                "event_id": rng.choice(("e", "é", "E")) + str(rng.randrange(self.shape.records)),
                "event_type": rng.choice(("impression", "click")),
                "event_time": moment,
                "received_at": self._received(moment),
                "campaign_id": rng.choice(("c-cpm", "c-cpc", "c-both", "c-both", "nobody")),
                "ad_id": rng.choice(("a-1", "a-2", "é" * 128)) if rng.random() < 0.3 else "a-1",
                "store_id": rng.choice(("s-1", "s-1", "s-2")),
                "user_id": rng.choice(("u-1", "u-2")),
                "impression_id": impression,
                "placement": placement,
                "price_micros": rng.choice((None, 0, 1, 999, 1500, 250_000, 10**12)),
                "currency": rng.choice(("EUR", "EUR", "USD", "JPY")),
                "user_agent": rng.choice((None, None, "Mozilla/5.0", "", "Mozilla/5.0 (compatible; Googlebot/2.1)")),
            }
        record = dict(rng.choice(known))
        moment = record["event_time"]
        changes: tuple[Change, ...] = (
            lambda r: r.update(event_type="click" if r["event_type"] == "impression" else "impression"),
            lambda r: r.update(event_time=moment + rng.choice((_MICROSECOND, -_MICROSECOND, timedelta(hours=1), timedelta(-3)))),
            lambda r: r.update(campaign_id=rng.choice(("c-cpm", "c-cpc", "c-both", "nobody"))),
            lambda r: r.update(ad_id=rng.choice(("a-1", "a-3"))),
            lambda r: r.update(store_id=rng.choice(("s-2", "s-3"))),
            lambda r: r.update(user_id=rng.choice(("u-2", "u-3"))),
            lambda r: r.update(impression_id=rng.choice((None, "", "e2"))),
            lambda r: r.update(placement=rng.choice((None, *TEXTS))),
            lambda r: r.update(price_micros=rng.choice((None, 0, 1, 7))),
            lambda r: r.update(currency=rng.choice(("USD", "GBP"))),
            lambda r: r.update(user_agent=rng.choice((None, "", "curl"))),
        )
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                pass  # resent as it was
            case 4 | 5 | 6:
                record["received_at"] = self._received(moment)
            case 7 if twin := TWINS.get((record["impression_id"], record["placement"])):
                record["impression_id"], record["placement"] = twin
            case _:
                rng.choice(changes)(record)
        return record

    def _order(self) -> dict[str, Any]:
        rng, known = self.rng, self.known["orders"]
        if not known or rng.random() < 0.3:
            moment = self._moment()
            return {
                "order_id": f"o{rng.randrange(self.shape.records // 6)}",
                "order_time": moment,
                "received_at": self._received(moment),
                "user_id": rng.choice(("u-1", "u-2")),
                "store_id": "s-1",
                "total_micros": rng.choice((0, 12_340_000, 10**15)),
                "currency": "EUR",
                "status": rng.choice(("placed", "placed", "cancelled")),
            }
        record = dict(rng.choice(known))
        moment = record["order_time"]
        match rng.randrange(10):
            case 0 | 1:
                pass
            case 2 | 3:
                record["received_at"] = self._received(moment)
            case 4 | 5 | 6:
                record["status"] = "cancelled" if record["status"] == "placed" else "placed"
            case 7:
                record["order_time"] = moment + rng.choice((_MICROSECOND, timedelta(hours=-2)))
            case 8:
                record["total_micros"] = rng.choice((1, 12_340_000))
            case _:
                record[rng.choice(("user_id", "store_id"))] = "other"
        return record

    # --- how a record is written

    def _time(self, moment: datetime, tidy: bool) -> str:
        """One instant, in one of the ways to write it."""
        rng = self.rng
        if tidy and rng.random() < 0.8:
            return moment.isoformat().replace("+00:00", "Z")
        minutes = rng.choice((0, 0, 0, 120, -330, 1439))
        text = moment.astimezone(timezone(timedelta(minutes=minutes))).isoformat()
        if "." in text:
            head, tail = text[:26], text[26:]
            text = head.rstrip("0") + tail if rng.random() < 0.3 else head + rng.choice(("", "" if tidy else "00")) + tail
        elif rng.random() < 0.2:
            text = text[:19] + rng.choice((".0", ".000000", ".0" if tidy else ".0000000")) + text[19:]
        if text.endswith("+00:00") and rng.random() < 0.9:
            text = text[:-6] + "Z"
        return text.lower() if rng.random() < 0.05 and not tidy else text

    def _shown(self, record: dict[str, Any], file: File) -> dict[str, Any]:
        rng = self.rng
        shown = {
            n: self._time(v, file.tidy) if isinstance(v, datetime) else v
            for n, v in record.items()
            if v is not None or rng.random() < 0.3
        }
        match rng.randrange(25):
            case 0:
                shown["region"] = rng.choice((*REGIONS, "EU", "", "" if file.tidy else 5))
            case 1 | 2 | 3:
                shown["region"] = file.region
            case 4:
                shown["region"] = None
            case 5:
                shown |= {"unknown": "x" if file.tidy else rng.choice(OTHER_TYPES), "Event_ID": "x"}
            case 6 if rng.random() < 0.2:
                # a line of exactly the longest size, or of a byte more; json.dumps below may make it longer still
                shown["pad"] = "x" * (LINE_BYTES - len(json.dumps({**shown, "pad": ""}).encode()) + rng.randrange(2))
            case _:
                pass
        return shown

    def _misjudge(self, stream: str, shown: dict[str, Any]) -> None:
        """One field of the right type with a wrong value, or none."""
        rng = self.rng
        time_field, amount, most, kind = (
            ("event_time", "price_micros", 10**12, "event_type")
            if stream == "events"
            else ("order_time", "total_micros", 10**15, "status")
        )
        name, wrong = rng.choice(
            (
                (rng.choice(REQUIRED[stream]), (None,)),
                (rng.choice([name for name in REQUIRED[stream] if name.endswith("_id")]), ("", "é" * 129)),
                (amount, (-1, most + 1, 2**63 - 1)),
                (time_field, ("1970-01-01T00:00:00Z", "1999-12-31T23:59:59.999999Z")),
                (kind, ("view", "Click", "")),
                ("currency", ("eur", "EURO", "ABC", "XXX", "")),
            )
        )
        shown[name] = rng.choice(wrong)
        if shown[name] is None and rng.random() < 0.5:
            del shown[name]

    def _spoil(self, stream: str, shown: dict[str, Any]) -> None:
        """One wrong field."""
        rng = self.rng
        time_field, amount, identity = (
            ("event_time", "price_micros", "event_id") if stream == "events" else ("order_time", "total_micros", "order_id")
        )
        ids = [name for name in REQUIRED[stream] if name.endswith("_id")]
        match rng.randrange(9):
            case 0:
                shown.pop(rng.choice(REQUIRED[stream]), None)
            case 1:
                shown[rng.choice(REQUIRED[stream])] = None
            case 2:
                shown[rng.choice([*ids, identity])] = rng.choice((*OTHER_TYPES, "", "é" * 129, "\ud83d"))
            case 3:
                shown[amount] = rng.choice((-1, 10**12 + 1 if stream == "events" else 10**15 + 1, 2**64, 1.0, "5", True, [], {}))
            case 4:
                shown[time_field] = rng.choice(BAD_TIMES)
            case 5:
                shown["received_at"] = rng.choice([t for t in BAD_TIMES if not str(t).startswith("19")])
            case 6:
                shown["currency"] = rng.choice(("eur", "EURO", "ABC", "XXX", "", " EUR", 978))
            case 7:
                shown["event_type" if stream == "events" else "status"] = rng.choice(("view", "Click", "", "placed ", 1))
            case _:
                shown["placement" if stream == "events" else "store_id"] = rng.choice((5, ["x"], {}, False, "\udc00"))

    def _json(self, shown: dict[str, Any]) -> bytes:
        rng = self.rng
        names = list(shown)
        if rng.random() < 0.2:
            rng.shuffle(names)
        separators = rng.choice(((", ", ": "), (",", ":"), (",", ":"), (" ,\t", " : ")))
        text = json.dumps({name: shown[name] for name in names}, ensure_ascii=rng.random() < 0.2, separators=separators)
        try:
            return text.encode()
        except UnicodeEncodeError:  # half a surrogate pair can only be written as an escape
            return json.dumps(shown).encode()

    def _break(self, line: bytes) -> bytes:
        """A line with wrong bytes, or none that is an object."""
        rng = self.rng
        middle = rng.randrange(1, len(line))
        wrong: tuple[bytes, ...] = (
            line + b"\r",
            line + b"\r",
            b"\xef\xbb\xbf" + line,
            line[:middle] + b"\x00" + line[middle:],
            line[:-2] + b"\xff" + line[-2:],
            line[:-2] + b"\xc3" + line[-2:],
            line[:middle],
            line[middle:],
            line + line,
            line[:-1] + b",}",
            line[:-1] + b',"x":NaN}',
            line[:-1] + b',"currency":"EUR"}',
            line[:-1] + b',"x":1,"x":1}',
            line.replace(b'"', b"'"),
            b" " + line + b" \t",
            b"[" + line + b"]",
            rng.choice((b"", b" ", b"\r", b"null", b"5", b'"x"', b"{}", b"nonsense", b"\xef\xbb\xbf")),
        )
        return rng.choice(wrong)
