"""The auditor's own reader of the suppression list: which token stands for the id of an erased person.

A file that came after the erasure may still have the id, and so may a resend. The tables have the token.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from functools import cache
from pathlib import Path

from spark_jobs.config import Settings
from spark_jobs.lake.places import open_place


class Suppressed:
    """The list in one state. ``digest`` changes with it; empty: nobody was erased."""

    def __init__(self, folder: str, key_file: str | None, digest: str) -> None:
        self._tokens: dict[str, str] = {}
        self._key = b""
        if digest:
            place = open_place(folder)
            self._tokens = json.loads(place.read("suppressed.json"))["tokens"]
            self._key = place.read("key") if key_file is None else Path(key_file).read_bytes()
        self._known: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def name(self, user_id: str) -> str:
        """Return the token of an erased person, or the id itself."""
        known = self._known.get(user_id)
        if known is None:
            digest = hmac.new(self._key, user_id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
            known = self._known[user_id] = self._tokens.get(digest, user_id)
        return known


State = tuple[str, str | None, str]
"""The folder of the list, the file of the key, and the digest of the list: what a process needs to open it."""

NOBODY: State = ("", None, "")


def suppressed_state(settings: Settings) -> State:
    """Return the present state of the list."""
    folder = f"{settings.lakehouse_uri}/_adtally/erasure"
    place = open_place(folder)
    if place.find("suppressed.json") is None:
        return NOBODY
    digest = hashlib.sha256(place.read("suppressed.json")).hexdigest()[:16]
    return folder, None if settings.erasure_key_file is None else str(settings.erasure_key_file), digest


@cache
def open_suppressed(state: State) -> Suppressed:
    """Open the list. Each state is read once."""
    return Suppressed(*state)
