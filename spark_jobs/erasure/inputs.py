"""Rewrite what the system was given: landing files, plain and gzip, also archived ones, and the lists of the rules.

A rewritten file keeps its name, the number of its lines, and on a disk its time of modification, so whoever has read it does not
read it again. A gzip file that ends wrongly still ends wrongly, at the same place and for the same reason.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from spark_jobs.config import Settings
from spark_jobs.erasure.lines import People, rewrite_line, rewrite_list
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.contract.spec import MAX_LINE_BYTES
from spark_jobs.ingest.files.landing import walk_landing
from spark_jobs.ingest.files.lines import Fault, unpacked
from spark_jobs.lake.landing_view import has_view, modified_ms, refresh_landing
from spark_jobs.lake.places import Place, open_place
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.lake.tables import STREAMS
from spark_jobs.steps import Step, durable

LANDING, ARCHIVE, RULES = "landing", "archive", "rules"
_BLOCK_BYTES = 8 * 1024 * 1024
_INVALID_BLOCK = b"\xff"  # deflate has no block of this type

Changed = Callable[[str, bytes, bytes], None]
"""Called with the name of a file, and with each line of it before and after."""


@dataclass
class InputFile:
    """A file before and after: ``root`` is LANDING, ARCHIVE or RULES. ``new_modified_ms`` is known once it is replaced."""

    root: str
    name: str
    old_sha256: str
    new_sha256: str
    old_size: int
    new_size: int
    old_modified_ms: int
    new_modified_ms: int | None = None

    def row(self) -> dict[str, object]:
        """Return the columns of table `erasures`."""
        names = ("old_sha256", "new_sha256", "old_modified_ms", "new_modified_ms")
        found = asdict(self)
        sizes = {"old_size_bytes": self.old_size, "new_size_bytes": self.new_size}
        kind = "archived_file" if self.root == ARCHIVE else "file"
        return {"kind": kind, "source_file": self.name, **sizes, **{name: found[name] for name in names}}


def plan_inputs(settings: Settings, people: People, changed: Changed) -> list[InputFile]:
    """Return the files that have one of the people, as they are and as they will be. Changes nothing.

    Raises AdtallyError if a line would become longer than a line may be.
    """
    refresh_landing(settings, is_full=True)
    found = []
    landed = [e for e in walk_landing(settings.landing_path) if e.reason is None and e.source.partition("/")[0] in STREAMS]
    times = {entry.name: entry.modified_ms for entry in landed}
    listed = [file.name for file in open_place(settings.rules_uri).list() if "/" not in file.name]
    with scratch_folder(settings, "erase-") as folder:
        for root, names in ((LANDING, sorted(times)), (ARCHIVE, _archived(settings)), (RULES, listed)):
            place = place_of(settings, root)
            for name in names:
                one = place.find(name)
                if one is None:
                    continue
                old, new = _rewrite(place, root, name, people, folder / "new", changed)
                if old != new:
                    found.append(InputFile(root, name, *(old[0], new[0], old[1], new[1]), times.get(name, 0)))
    return found


def replace_input(settings: Settings, file: InputFile, people: People, number: int) -> None:
    """Replace a file, unless it is replaced already, and note its new time of modification.

    Raises AdtallyError if somebody else has changed it.
    """
    place = place_of(settings, file.root)
    found = place.find(file.name)
    with scratch_folder(settings, "erase-") as folder:
        if found is not None:
            old, new = _rewrite(place, file.root, file.name, people, folder / "new", lambda *_: None)
            if old[0] == file.old_sha256:
                file.new_sha256, file.new_size = new
                with durable(Step.ERASED_INPUT, number):
                    place.rewrite(folder / "new", found)
                found = place.find(file.name)
            elif old != new:
                raise AdtallyError(
                    f"{file.name} has changed since the erasure was decided",
                    hint="files in the landing folder must not change; put it back, or remove it, and run `adtally erase` again",
                )
            else:
                file.new_sha256, file.new_size = old
    is_object = found is not None and has_view(settings) and file.root == LANDING
    file.new_modified_ms = modified_ms(found) if found is not None and is_object else file.old_modified_ms


def place_of(settings: Settings, root: str) -> Place:
    """Return where the files of a root are read and written."""
    return open_place({LANDING: settings.landing_uri, ARCHIVE: settings.raw_archive_uri or "", RULES: settings.rules_uri}[root])


def _archived(settings: Settings) -> list[str]:
    """Return the landing files in the archive of raw input."""
    if settings.raw_archive_uri is None:
        return []
    names = (file.name for file in open_place(settings.raw_archive_uri).list())
    return [name for name in names if name.split("/")[0] in STREAMS and name.endswith((".jsonl", ".jsonl.gz"))]


def _rewrite(
    place: Place, root: str, name: str, people: People, target: Path, changed: Changed
) -> tuple[tuple[str, int], tuple[str, int]]:
    """Write the rewritten file to ``target``. Returns SHA-256 and size before and after; equal if it has nobody."""
    is_packed = name.endswith(".gz")
    with place.open(name) as stored:
        source = _Hashing(stored)
        is_changed = False
        fault = ""

        def rewritten() -> Iterator[bytes]:
            nonlocal is_changed, fault
            try:
                for block in _blocks(unpacked(source, None) if is_packed else _pieces(source)):  # type: ignore[arg-type]
                    made = rewrite_list(block, people) if root == RULES else _rewrite_block(block, name, people, changed)
                    is_changed |= made != block
                    yield made
            except Fault as found:
                fault = str(found)

        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        made = hashlib.sha256()
        size = 0
        with target.open("wb") as file:

            def write(data: bytes) -> None:
                nonlocal size
                file.write(data)
                made.update(data)
                size += len(data)

            for block in rewritten():
                write(packer.compress(block) if is_packed else block)
            if is_packed:
                write(packer.flush(zlib.Z_SYNC_FLUSH if fault else zlib.Z_FINISH))
            if fault == "corrupt_gzip":
                write(_INVALID_BLOCK)
        for _ in _pieces(source):  # what follows a fault
            pass
    old = source.sha256.hexdigest(), source.size
    return old, (made.hexdigest(), size) if is_changed else old


class _Hashing:
    """A reader that hashes what is read."""

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        data = self._stored.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data


def _pieces(source: _Hashing) -> Iterator[bytes]:
    while piece := source.read(_BLOCK_BYTES):
        yield piece


def _blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join pieces into blocks of whole lines. What came before a fault is a block of its own."""
    waiting: list[bytes] = []
    size = 0
    fault: Fault | None = None
    try:
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= _BLOCK_BYTES and b"\n" in piece:
                data = b"".join(waiting)
                cut = data.rfind(b"\n") + 1
                waiting, size = [data[cut:]], len(data) - cut
                yield data[:cut]
    except Fault as found:
        fault = found
    if rest := b"".join(waiting):
        yield rest
    if fault is not None:
        raise fault


def _rewrite_block(block: bytes, name: str, people: People, changed: Changed) -> bytes:
    if not people.may_be_in(block):
        return block
    lines = block.split(b"\n")
    for at, line in enumerate(lines):
        made = rewrite_line(line, people)
        if made == line:
            continue
        if len(line) <= MAX_LINE_BYTES < len(made):
            raise AdtallyError(
                f"{name}: a line of {len(line)} bytes would have {len(made)} with the token, more than a line may have",
                hint="take the file out of the landing folder, and run `adtally erase` again",
            )
        lines[at] = made if len(line) <= MAX_LINE_BYTES else made.ljust(len(line))  # what was too long stays too long
        changed(name, line, made)
    return b"\n".join(lines)
