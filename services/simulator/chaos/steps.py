"""The registry of steps: what a history may do, how often, with which arguments, and what that makes true.

To add a step, write a class with ``name``, ``weight``, ``draw`` and ``run``, and add it to STEPS. ``run`` does it in the world and
tells the model what is certain from then on; the invariants are checked after it.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any, Protocol

from obstore.store import ObjectStore

from services.simulator.chaos.checks import require
from services.simulator.chaos.history import History, Step
from services.simulator.chaos.programs import Ended
from services.simulator.chaos.world import FIRST_MS, World

Arguments = dict[str, Any]

EVENT_STEPS = ("events", "key_index", "rejected_events", "minute_metrics", "events_ledger", "commits")
ORDER_STEPS = ("orders", "rejected_orders", "orders_ledger")
CORRECTION_STEPS = (
    *("correction_decided", "corrected_events", "corrected_rejects", "corrected_metrics", "corrected_orders"),
    *("corrected_order_rejects", "corrected_ledger", "restatements", "reconciliations", "correction_done"),
)
CRASH_STEPS = {
    "ingest": (*EVENT_STEPS, *ORDER_STEPS, "traffic_reviews", *CORRECTION_STEPS, "attributed_orders", "billing_lines"),
    "review": ("rule_sets", "traffic_reviews", *CORRECTION_STEPS),
    "attribute": ("rule_sets", "attributed_orders"),
    "bill": ("billing_lines",),
    "reconcile --repair": CORRECTION_STEPS,
    "compact": ("compaction",),
    "vacuum": ("vacuum",),
    "erase": (
        *("erasure_decided", "suppressed", "erased_input", "erased_rows", "erasures", "erased_versions"),
        *("erasure_carried_out", "erasure_done"),
    ),
}
"""The durable steps (spark_jobs/steps.py) at which a command may kill itself; other commands are killed after some milliseconds."""

CORRECTING = ("ingest", "review", "reconcile", "backfill", "fsck")
TRAFFIC = (datetime(2025, 5, 28, tzinfo=UTC), datetime(2025, 6, 8, tzinfo=UTC))
"""The hours of nearly all traffic."""
DERIVED = (
    *("key_index", "recount", "attribution_index", "checked_versions.json", "marts", "attempts", "scratch", "quality"),
    *("checkpoints_view", "landing_view", "rules_view"),
)
"""What of a home may be deleted at any time when no command runs (docs/architecture.md)."""
_DAYS_MS = 86_400_000


class Kind(Protocol):
    """A kind of step. ``weight`` is how often it comes, beside the others."""

    name: str
    weight: int

    def draw(self, rng: random.Random) -> Arguments:
        """Draw the arguments of a step."""

    def run(self, world: World, arguments: Arguments) -> None:
        """Do the step, and tell the model. Raises Violation."""


def draw_fault(rng: random.Random, command: str) -> Arguments:
    """Draw how a command is killed: at a durable step, or after some milliseconds."""
    steps = CRASH_STEPS.get(command.removesuffix(" --no-settle"))
    if steps is not None and rng.random() < 0.6:
        step = rng.choice(steps)
        moment = "after" if step == "commits" else rng.choice(("before", "after"))
        return {"crash_at": f"{moment}:{step}", "batches_ahead": rng.randrange(2)}
    return {"kill_after_ms": int(rng.choice((30, 150, 500, 1500, 4000)) * (0.5 + rng.random()))}


def begin(world: World, command: str, arguments: Arguments) -> str:
    """Start a command with its fault."""
    crash_at = arguments.get("crash_at")
    if crash_at is not None:
        name = crash_at.split(":")[1]
        stream = "orders" if name in ORDER_STEPS else "events" if name in EVENT_STEPS else None
        crash_at += f":{world.batches(stream) + arguments['batches_ahead'] if stream else 0}"
    return world.start(*command.split(), crash_at=crash_at)


def tell(world: World, command: str, ended: Ended, *, may_fail: bool = False) -> None:
    """Tell the model how a command ended. Raises Violation if it failed and should not."""
    model = world.model
    verb = command.split()[0]
    is_correcting = verb in CORRECTING and "--no-settle" not in command
    if is_correcting:
        model.is_corrected = True
    if ended.was_killed:
        world.struck["kill"] += 1
    if ended.status == 0:
        if verb == "ingest":
            model.end_ingest()
        if is_correcting and command != "fsck":
            model.is_correcting = False
        if verb == "review" or command == "ingest":
            model.reviewed()
        if verb == "marts" or "--repair" in command:
            model.marts_differ = False
        if "--repair" in command and model.has_read_all:
            model.needs_repair = False
        return
    if not ended.was_killed:
        if verb == "marts" and "run `adtally ingest` first" in ended.said and not model.books().ledger:
            return
        doubtful = (
            (verb == "reconcile" and model.marts_differ)
            or model.is_torn
            or model.needs_repair
            or (model.is_correcting and verb in ("fsck", "status", "reconcile"))
        )
        if not (may_fail or (doubtful and verb != "ingest")):
            require(False, "command succeeds", f"{ended.words}: {ended.status}: {ended.said[-1500:]}")
        if verb not in ("fsck", "status", "reconcile"):
            world.failed_clearly(ended)
        if not may_fail:
            return
    if verb == "ingest":
        model.begin_ingest()
    if is_correcting:
        model.is_correcting = True
        model.is_reviewed = False
        model.forget_books()


class Land:
    """Files land: events and orders, resent, changed, late, broken, of odd names and forms."""

    name, weight = "land", 9

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        return {"number": rng.randrange(10**6), "records": rng.choice((8, 25, 60))}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        files = world.traffic.landing(arguments["number"], arguments["records"], world.model.clock_ms)
        if any((world.landing / file.name).exists() for file in files):  # drawn twice: a name is used once
            return
        for file in files:
            world.land(file)
        world.model.land(files)


class Command:
    """One command runs to its end."""

    def __init__(self, command: str, weight: int) -> None:
        self.name, self.weight, self._command = command, weight, command

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        return {}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        tell(world, self._command, world.wait(world.start(*self._command.split())))


class Backfill:
    """The closed hours of the traffic are recomputed from the raw input. The rules are the same, so nothing may change."""

    name, weight = "backfill", 1

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        return {}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        closed = world.closed_through()
        if closed is None or closed <= TRAFFIC[0]:
            return
        begin, end = (f"{moment:%Y-%m-%dT%H:%M:%SZ}" for moment in (TRAFFIC[0], min(closed, TRAFFIC[1])))
        tell(world, "backfill", world.wait(world.start("backfill", "--from", begin, "--to", end)))


class Killed:
    """A command is killed with SIGKILL, at a durable step or at any time."""

    name, weight = "killed", 9
    commands = ("ingest", "ingest", "ingest --no-settle", "review", "attribute", "bill", "reconcile --repair", "compact")

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        command = rng.choice(self.commands)
        return {"command": command, **draw_fault(rng, command)}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        command = arguments["command"]
        name = begin(world, command, arguments)
        tell(world, command, world.wait(name, arguments.get("kill_after_ms")))


class PowerCut:
    """A command is killed and the power goes at once or seconds later: what was not synced is lost."""

    name, weight = "power cut", 3

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        command = rng.choice(Killed.commands)
        return {"command": command, "seconds_later": rng.random() < 0.5, **draw_fault(rng, command)}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        if world.disk is None:
            world.skipped.add(self.name)
            return
        command = arguments["command"]
        name = begin(world, command, arguments)
        ended = world.wait(name, arguments.get("kill_after_ms"))
        world.disk.cut(seconds_later=arguments["seconds_later"])
        world.struck["power cut"] += 1
        tell(world, command, ended)
        world.model.is_torn = True


class FullDisk:
    """A command runs while nearly nothing is left on the disk."""

    name, weight = "full disk", 3

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        return {"command": rng.choice(Killed.commands), "kilobytes": rng.choice((0, 16, 64, 200, 500, 1500))}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        if world.disk is None:
            world.skipped.add(self.name)
            return
        command = arguments["command"]
        with world.nearly_full(arguments["kilobytes"]):
            ended = world.wait(world.start(*command.split()))
        world.struck["full disk"] += ended.status != 0
        tell(world, command, ended, may_fail=True)


class MoveClock:
    """The clock of whoever lands files jumps, back or ahead."""

    name, weight = "move clock", 2

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        return {"days": rng.choice((-5000, -30, -1, 1, 400, 20_000))}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        world.model.move_clock(FIRST_MS + arguments["days"] * _DAYS_MS)


class Corrupt:
    """A data file is damaged; fsck has to find it, and to repair it from the raw input."""

    name, weight = "corrupt", 2
    tables = ("events", "minute_metrics", "batch_ledger", "rejected_events", "orders")

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        damage = rng.choice(("missing", "cut", "flipped"))
        return {"table": rng.choice(self.tables), "damage": damage, "file": rng.randrange(1000)}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        model = world.model
        files = world.tables.data_files(arguments["table"]) if not model.is_torn else []
        if not files or not model.has_read_all or model.is_correcting or model.needs_repair:
            return  # another step's damage is repaired first, so that it is known whose finding it is
        damage = arguments["damage"]
        _damage(world.tables.files, files[arguments["file"] % len(files)], damage)
        world.sync()
        what = f"{damage} file of {arguments['table']}"
        found = world.wait(world.start("fsck"))
        is_found = found.status == 1
        require(is_found or damage == "flipped", "fsck finds damage", f"{what}: {found.said[-1500:]}")
        world.struck["damaged file"] += is_found
        if is_found:  # a flip may hit a byte that no reader needs, in a file that has no checksum
            repaired = world.wait(world.start("fsck", "--repair"))
            require(repaired.status == 0, "fsck repairs", f"{what}: {repaired.said[-3000:]}")
            model.is_corrected = model.marts_differ = True
            model.is_reviewed = False
            model.forget_books()


def _damage(files: ObjectStore, name: str, damage: str) -> None:
    if damage == "missing":
        files.delete(name)
        return
    data = bytearray(files.get(name).bytes())
    if damage == "cut":
        del data[-min(50, len(data)) :]
    else:
        at = len(data) // 3
        data[at : at + 64] = bytes(byte ^ 0xFF for byte in data[at : at + 64])
    files.put(name, bytes(data))


class Lose:
    """A derived part of the home is deleted, or all of them; or the checkpoint."""

    name, weight = "lose", 4

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        return {"part": rng.choice((*DERIVED[:5], "checkpoints", "checkpoints", "all of the machine's"))}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        part = arguments["part"]
        for one in (*DERIVED, "checkpoints") if part == "all of the machine's" else (part,):
            if not world.lose(one):
                continue
            world.struck["lost part"] += 1
            if one == "checkpoints" and not world.in_store:  # in a store is a copy
                world.model.forget()


class LoseMachine:
    """The machine with the home is lost, and another one continues on the lakehouse in the store."""

    name, weight = "lose machine", 5

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        return {}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        world.lose_machine()
        world.struck["lost machine"] += 1


class Erase:
    """A person is erased; the command may be killed, and the next one finishes it. From then on there is one token for the id."""

    name, weight = "erase", 2

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        return {"person": rng.randrange(1000), **(draw_fault(rng, "erase") if rng.random() < 0.5 else {})}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        model = world.model
        if not model.has_read_all or model.is_correcting or model.needs_repair or model.is_torn:
            return  # an erasure refuses interrupted batches, and proves that a recount agrees
        events = model.books().events
        people = sorted({event["user_id"] for event in events.values() if event["user_id"].startswith("u-")})
        if not people:
            return
        person = people[arguments["person"] % len(people)]
        own = {event_id for event_id, event in events.items() if event["user_id"] == person}
        command = f"erase --user {person} --yes"
        if len(arguments) > 1:
            killed = world.wait(begin(world, command, arguments), arguments.get("kill_after_ms"))
            world.struck["kill"] += killed.was_killed
            world.run("erase", "--yes")
        world.run(*command.split())
        tokens = {row["user_id"] for row in world.tables.dicts("events", "event_id, user_id") if row["event_id"] in own}
        require(len(tokens) == 1 and person not in tokens, "one token a person", f"{person}: {sorted(tokens)}")
        world.struck["erased person"] += 1
        model.erase(person, tokens.pop())


class AtOnce:
    """Several commands at once; one of them may be killed."""

    name, weight = "at once", 4
    commands = (
        *("ingest", "ingest", "ingest --no-settle", "review", "attribute", "bill", "reconcile --repair", "reconcile", "compact"),
        *("vacuum", "status", "fsck", "marts build"),
    )

    def draw(self, rng: random.Random) -> Arguments:
        """See Kind."""
        commands = rng.sample(self.commands, 2 if rng.random() < 0.7 else 3)
        killed = rng.choice(commands) if rng.random() < 0.4 else None
        return {"commands": commands, "killed": killed, "kill_after_ms": rng.randrange(50, 3000)}

    def run(self, world: World, arguments: Arguments) -> None:
        """See Kind."""
        commands = arguments["commands"]
        names = [world.start(*command.split()) for command in commands]
        ended = {}
        if arguments["killed"] in commands:
            at = commands.index(arguments["killed"])
            ended[at] = world.wait(names[at], arguments["kill_after_ms"])
        for at, name in enumerate(names):
            if at not in ended:
                ended[at] = world.wait(name)
        ingests = [command for command in commands if command.startswith("ingest")]
        may_refuse = len(ingests) > 1 or "fsck" in commands
        for at in sorted(ended, key=lambda at: not commands[at].startswith("ingest")):
            if may_refuse and "another ingest (or fsck) runs" in ended[at].said:
                continue
            tell(world, commands[at], ended[at])
        if ingests:  # a command that ran beside an ingest has not seen all of it
            world.model.is_reviewed = False
            world.model.forget_books()


STEPS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Land(),
        Command("ingest", 5),
        Command("ingest --no-settle", 3),
        Killed(),
        PowerCut(),
        FullDisk(),
        MoveClock(),
        Corrupt(),
        Lose(),
        LoseMachine(),
        Erase(),
        AtOnce(),
        Command("review", 1),
        Command("attribute", 1),
        Command("bill", 1),
        Command("reconcile", 1),
        Command("reconcile --repair", 2),
        Command("compact", 2),
        Command("vacuum", 1),
        Command("fsck", 1),
        Command("status", 1),
        Command("marts build", 1),
        Backfill(),
    )
}


ON_A_DISK, IN_A_STORE = {"power cut", "full disk"}, {"lose machine"}
"""Steps for histories whose lakehouse lies on a disk, or in a store."""


def draw_history(seed: int, steps: int, *, in_store: bool = False) -> History:
    """Draw a history from a seed. The first step lands files."""
    rng = random.Random(f"history {seed}")
    kinds = [kind for kind in STEPS.values() if kind.name not in (ON_A_DISK if in_store else IN_A_STORE)]
    drawn = [Land(), *rng.choices(kinds, weights=[kind.weight for kind in kinds], k=max(steps - 1, 0))]
    return History(
        seed=seed,
        steps=tuple(Step(kind.name, kind.draw(rng)) for kind in drawn[:steps]),
        files_per_batch=rng.choice((1, 2, 3, 100)),
        split_bytes=rng.choice((4096, 16 * 1024 * 1024)),
        builds_marts=rng.random() < 0.3,
        in_store=in_store,
    )
