"""Input for the benchmarks: ad events as JSON lines, the same bytes for the same seed, with a known answer.

An event is a pure function of (seed, its number), so that a resend can repeat any earlier event without keeping it.
Position i of the input is either the next new event or, for 5 % of the positions, a resend: half of an event of the
same batch, half of an event of an earlier batch (the first batch has no earlier one). Batches do not depend on how many
follow, so a longer input begins with the shorter one and is made by adding files to it.

    python -m benchmarks.make_input --out DIR --events 4000000

writes DIR/events/<region>/part-*.jsonl (modification times rise by a second in file order),
DIR/campaigns/campaigns.csv and DIR/expected.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.bytes_]

FORMAT = 1  # part of the cache key: raise it when the bytes change
EVENTS_PER_SECOND = 2_000
RESENT_SHARE = 0.05
CLICK_SHARE = 0.02
CAMPAIGNS = 1_000
ADS = 10_000
STORES = 400
USERS = 2_000_000
REGIONS = ("eu", "us")
PLACEMENTS = ("feed", "search", "checkout", "banner")
START_MICROS = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z
FIRST_MTIME = 1_767_225_600
AGENTS = (
    "ShopApp/7.3 (iOS 18.1)",
    "ShopApp/7.3 (iPad)",
    "ShopApp/7.2 (Android)",
    "ShopWeb/41",
    "ShopWeb/41 (mobile)",
)


@dataclass(frozen=True)
class InputSpec:
    """What the bytes of an input depend on, besides its length. ``batch`` is in lines, a whole number of files."""

    batch: int = 1_000_000
    files_per_batch: int = 8
    seed: int = 7
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.batch <= 0 or self.batch % self.files_per_batch:
            raise ValueError(f"a batch of {self.batch} lines is not a whole number of {self.files_per_batch} files")

    @property
    def lines_per_file(self) -> int:
        return self.batch // self.files_per_batch


def _mix(values: U64, salt: int) -> U64:
    """SplitMix64's finalizer: 64 well-mixed bits of each value."""
    z = values + np.uint64((salt * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _unit(bits: U64) -> npt.NDArray[np.float64]:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _zipf_bounds(n: int, exponent: float) -> npt.NDArray[np.float64]:
    weights = 1.0 / np.arange(1, n + 1) ** exponent
    bounds: npt.NDArray[np.float64] = np.cumsum(weights) / weights.sum()
    return bounds


def _pool(items: list[str]) -> Bytes:
    return np.array([item.encode() for item in items])


_HEX = _pool([f"{i:04x}" for i in range(65536)])
_THREE_DIGITS = _pool([f"{i:03d}" for i in range(1000)])


class World:
    """The keys of the traffic: which ad is in which campaign, whose it is, and what the campaign pays for."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.ad_campaign = np.concatenate([np.arange(CAMPAIGNS), rng.integers(0, CAMPAIGNS, ADS - CAMPAIGNS)])
        self.campaign_store = rng.integers(0, STORES, CAMPAIGNS)
        self.campaign_is_cpc = rng.random(CAMPAIGNS) < 0.6
        self.by_popularity = rng.permutation(ADS)
        self.ad_bounds = _zipf_bounds(ADS, 1.0)
        self.campaign_ids = [f"c-{i:04d}" for i in range(CAMPAIGNS)]
        self.store_ids = [f"st-{i:04d}" for i in range(STORES)]
        # The fields that follow from the ad, in one lookup.
        self.ad_fields = _pool(
            [
                f'"campaign_id":"{self.campaign_ids[c]}","ad_id":"ad-{a:05d}","store_id":"{self.store_ids[self.campaign_store[c]]}"'
                for a, c in enumerate(self.ad_campaign)
            ]
        )

    def campaigns_csv(self) -> str:
        """The campaigns file of the landing folder, one open row a campaign."""
        lines = ["campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to"]
        for i, name in enumerate(self.campaign_ids):
            model = "cpc" if self.campaign_is_cpc[i] else "cpm"
            store = self.store_ids[self.campaign_store[i]]
            lines.append(f"{name},{store},{model},{(50 + i % 450) * 1_000_000},EUR,2020-01-01T00:00:00Z,")
        return "\n".join(lines) + "\n"


@dataclass
class Counts:
    """What an exact reader of one batch must find, given all the batches before it."""

    offered: int = 0
    unique: int = 0
    duplicates: int = 0
    impressions: int = 0
    clicks: int = 0
    spend_nanos: int = 0

    def add(self, other: Counts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def uuid_text(numbers: U64, seed: int) -> Bytes:
    """Ids of 36 characters that look like random UUIDs, one for each event number."""
    a, b = _mix(numbers, 2 * seed + 11), _mix(numbers, 2 * seed + 12)
    parts = [_HEX[(x >> np.uint64(s) & np.uint64(0xFFFF)).astype(np.int64)] for x in (a, b) for s in (0, 16, 32, 48)]
    out = np.full((len(numbers), 36), ord("-"), np.uint8)
    for column, part in zip((0, 4, 9, 14, 19, 24, 28, 32), parts, strict=True):
        out[:, column : column + 4] = part.view(np.uint8).reshape(-1, 4)
    return out.view("S36").ravel()


def time_text(micros: I64) -> Bytes:
    """RFC 3339 UTC with six digits of the second, for times that span hours rather than years."""
    seconds = micros // 1_000_000
    first = int(seconds.min())
    span = np.arange(first, int(seconds.max()) + 1).astype("datetime64[s]")
    texts = np.datetime_as_string(span).astype("S19")
    rest = micros % 1_000_000
    out = np.empty((len(micros), 27), np.uint8)
    out[:, :19] = texts[seconds - first].view(np.uint8).reshape(-1, 19)
    out[:, 19] = ord(".")
    out[:, 20:23] = _THREE_DIGITS[rest // 1000].view(np.uint8).reshape(-1, 3)
    out[:, 23:26] = _THREE_DIGITS[rest % 1000].view(np.uint8).reshape(-1, 3)
    out[:, 26] = ord("Z")
    return out.view("S27").ravel()


def lines_of(columns: list[bytes | Bytes], rows: int) -> bytes:
    """The columns side by side, one line a row: laid out at full width, then the padding is squeezed out."""
    widths = [len(c) if isinstance(c, bytes) else c.dtype.itemsize for c in columns]
    out = np.empty((rows, sum(widths)), np.uint8)
    at = 0
    for column, width in zip(columns, widths, strict=True):
        if isinstance(column, bytes):
            out[:, at : at + width] = np.frombuffer(column, np.uint8)
        else:
            out[:, at : at + width] = np.ascontiguousarray(column).view(np.uint8).reshape(-1, width)
        at += width
    return out.tobytes().translate(None, b"\0")


def batch_plan(spec: InputSpec, number: int) -> tuple[U64, npt.NDArray[np.bool_], int]:
    """Event numbers of batch ``number`` by position, which positions are resends, and the first new event number."""
    rng = np.random.default_rng([spec.seed, 1, number])
    resends = int(spec.batch * RESENT_SHARE)
    new = spec.batch - resends
    first = number * new
    # A batch starts with something to resend.
    where = np.sort(rng.choice(np.arange(10, spec.batch), size=resends, replace=False))
    is_resend = np.zeros(spec.batch, bool)
    is_resend[where] = True
    events = np.cumsum(~is_resend) - 1 + first
    seen = events[where] + 1  # new events up to here, this batch's included
    earlier = np.zeros(resends, bool)
    if number:
        earlier[rng.choice(resends, size=resends // 2, replace=False)] = True
    draw = rng.random(resends)
    low, high = np.where(earlier, 0, first), np.where(earlier, first, seen)
    events[where] = low + (draw * (high - low)).astype(np.int64)
    return events.astype(np.uint64), is_resend, first


def file_bytes(
    spec: InputSpec, world: World, events: U64, is_resend: npt.NDArray[np.bool_], position: int, region: str
) -> tuple[bytes, Counts]:
    """One file: its bytes and its share of the expected counts. ``position`` is that of its first line in the input."""
    rows = len(events)
    rank = np.searchsorted(world.ad_bounds, _unit(_mix(events, spec.seed * 31 + 1)))
    ad = world.by_popularity[np.minimum(rank, ADS - 1)]
    detail = _mix(events, spec.seed * 31 + 2)
    is_click = _unit(_mix(events, spec.seed * 31 + 3)) < CLICK_SHARE
    user = (_mix(events, spec.seed * 31 + 4) % np.uint64(USERS)).astype(np.int64)
    # Events come at the rate of the new ones among all the lines, up to two seconds out of order.
    new_per_second = EVENTS_PER_SECOND * (1 - RESENT_SHARE)
    event_time = START_MICROS + (events.astype(np.float64) * (1e6 / new_per_second)).astype(np.int64)
    event_time -= (detail >> np.uint64(20) & np.uint64(0x1FFFFF)).astype(np.int64) - 2_100_000
    arrived = START_MICROS + (position + np.arange(rows, dtype=np.int64)) * (1_000_000 // EVENTS_PER_SECOND)
    received = np.maximum(arrived + 2_500_000, event_time)
    # An impression's price is per thousand for cpm; a click's price is that of the click.
    is_cpc = world.campaign_is_cpc[world.ad_campaign[ad]]
    price = np.where(
        is_click,
        50_000 + (detail >> np.uint64(41) & np.uint64(0x7FFFF)).astype(np.int64),
        1_000_000 + (detail >> np.uint64(41) & np.uint64(0x3FFFFF)).astype(np.int64),
    )
    nanos = np.where(is_click & is_cpc, price * 1000, np.where(~is_click & ~is_cpc, price, 0))
    # A click names an impression of the last minutes (whether it exists plays no part here).
    shown = uuid_text(np.where(events > 100, events - np.uint64(100), events), spec.seed)
    impression = np.where(is_click, np.char.add(np.char.add(b'"impression_id":"', shown[:]), b'",'), b"")
    kinds = _pool(["impression", "click"])
    data = lines_of(
        [
            b'{"event_id":"', uuid_text(events, spec.seed), b'","event_type":"', kinds[is_click.astype(np.int64)],
            b'","event_time":"', time_text(event_time), b'","received_at":"', time_text(received),
            b'","region":"' + region.encode() + b'",', world.ad_fields[ad],
            b',"user_id":"u-', _THREE_DIGITS[user // 1_000_000], _THREE_DIGITS[user // 1000 % 1000],
            _THREE_DIGITS[user % 1000], b'",', impression.astype("S60"),
            b'"placement":"', _pool(list(PLACEMENTS))[(detail & np.uint64(3)).astype(np.int64)],
            b'","price_micros":', price.astype("S7"), b',"currency":"EUR","user_agent":"',
            _pool(list(AGENTS))[(detail >> np.uint64(4) & np.uint64(0xFFFF)).astype(np.int64) % len(AGENTS)], b'"}\n',
        ],
        rows,
    )  # fmt: skip
    new = ~is_resend
    counts = Counts(
        offered=rows,
        unique=int(new.sum()),
        duplicates=int(is_resend.sum()),
        impressions=int((new & ~is_click).sum()),
        clicks=int((new & is_click).sum()),
        spend_nanos=int(nanos[new].sum()),
    )
    return data, counts


def make_input(out: Path, events: int, spec: InputSpec) -> dict[str, Any]:
    """Make the input, or the part of it that is not there yet; the content of expected.json.

    ``events`` must be a whole number of batches. The cumulative counts of each batch are under ``after_batch``.
    """
    if events <= 0 or events % spec.batch:
        raise ValueError(f"{events} events are not a whole number of batches of {spec.batch}")
    expected_path = out / "expected.json"
    expected: dict[str, Any] = {"spec": asdict(spec), "after_batch": [], "bytes": []}
    if expected_path.exists():
        expected = json.loads(expected_path.read_text())
        if expected["spec"] != asdict(spec):
            raise ValueError(f"{out} holds another input: {expected['spec']}")
    world = World(spec.seed)
    for region in REGIONS:
        (out / "events" / region).mkdir(parents=True, exist_ok=True)
    (out / "campaigns").mkdir(exist_ok=True)
    (out / "campaigns" / "campaigns.csv").write_text(world.campaigns_csv())
    total = Counts(**expected["after_batch"][-1]) if expected["after_batch"] else Counts()
    for number in range(len(expected["after_batch"]), events // spec.batch):
        numbers, is_resend, _ = batch_plan(spec, number)
        written = 0
        for k in range(spec.files_per_batch):
            index = number * spec.files_per_batch + k
            part = slice(k * spec.lines_per_file, (k + 1) * spec.lines_per_file)
            path = input_file(out, index)
            data, counts = file_bytes(spec, world, numbers[part], is_resend[part], index * spec.lines_per_file, path.parent.name)
            path.write_bytes(data)
            os.utime(path, (FIRST_MTIME + index, FIRST_MTIME + index))
            total.add(counts)
            written += len(data)
        expected["after_batch"].append(asdict(total))
        expected["bytes"].append(written)
        scratch = expected_path.with_suffix(".tmp")
        scratch.write_text(json.dumps(expected, indent=1) + "\n")
        scratch.replace(expected_path)
    return expected


def input_file(root: Path, index: int) -> Path:
    """Path of the input's file ``index``; the regions take turns."""
    return root / "events" / REGIONS[index % len(REGIONS)] / f"part-{index:06d}.jsonl"


def prefix_view(source: Path, target: Path, batches: int, spec: InputSpec) -> None:
    """A landing folder with the first ``batches`` batches of ``source``, by hard links: no copy, same times."""
    for region in REGIONS:
        (target / "events" / region).mkdir(parents=True, exist_ok=True)
    (target / "campaigns").mkdir(parents=True, exist_ok=True)
    (target / "campaigns" / "campaigns.csv").write_bytes((source / "campaigns" / "campaigns.csv").read_bytes())
    for index in range(batches * spec.files_per_batch):
        os.link(input_file(source, index), input_file(target, index))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--events", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=1_000_000, help="lines of a batch")
    parser.add_argument("--files-per-batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    expected = make_input(args.out, args.events, InputSpec(args.batch, args.files_per_batch, args.seed))
    size = sum(expected["bytes"])
    print(
        f"{len(expected['after_batch'])} batches, {size / 2**20:.0f} MiB, "
        f"{size / expected['after_batch'][-1]['offered']:.0f} bytes an event, {time.perf_counter() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
