"""The suppression list: the token of each erased person, by the HMAC of the id. It lets no later record bring the id back.

It is below the lakehouse root, on a disk as in a store, because every machine must know it and a machine may be lost. No id can be
found from the list and the tables without the key (docs/decisions/0031-how-a-person-is-erased.md).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.erasure.lines import USER_FIELD, People, rewrite_line
from spark_jobs.errors import ConfigurationError, TableCorruptionError
from spark_jobs.lake.places import Place, open_place
from spark_jobs.steps import Step, durable

KEY_FILE = "key"
LIST_FILE = "suppressed.json"
QUEUE, RUNS, RECEIPTS = "queue", "runs", "receipts"
"""Folders beside the list: requests that wait, erasures that are not proven yet, and receipts. The first two have ids."""

_KEY_BYTES = 32


@dataclass(frozen=True)
class Suppression:
    """The key, and the tokens by the HMAC (64 hex digits) of the id."""

    key: bytes = field(repr=False)
    tokens: Mapping[str, str] = field(repr=False)

    def person(self, user_id: str) -> str:
        """Return the HMAC of an id."""
        return hmac.digest(self.key, user_id.encode("utf-8", "surrogatepass"), hashlib.sha256).hex()

    def token_of(self, user_id: str) -> str | None:
        """Return the token that replaces an id; None if the person is not erased."""
        return self.tokens.get(self.person(user_id))

    def apply(self, records: pa.Table) -> pa.Table:
        """Replace the ids of erased people in column ``user_id`` of valid records."""
        users = records[USER_FIELD]
        found = {one: token for one in pc.unique(users).to_pylist() if (token := self.token_of(one)) is not None}
        if not found:
            return records
        at = pc.index_in(users, value_set=pa.array(found, pa.string()))
        tokens = pc.take(pa.array(found.values(), pa.string()), at)
        return records.set_column(records.schema.get_field_index(USER_FIELD), USER_FIELD, pc.coalesce(tokens, users))

    def line(self, raw: bytes) -> bytes:
        """Replace the ids of erased people in a rejected line, or in the value of a Kafka record."""
        return rewrite_line(raw, People({}, self.token_of))

    def plus(self, tokens: Mapping[str, str]) -> Suppression:
        """Return the list with the tokens of further people, by id."""
        return Suppression(self.key, {**self.tokens, **{self.person(one): token for one, token in tokens.items()}})


def erasure_place(settings: Settings) -> Place:
    """Return where the suppression list, the queue and unfinished erasures are kept."""
    return open_place(settings.lakehouse_uri).below("_adtally/erasure")


def read_suppression(settings: Settings) -> Suppression | None:
    """Return the suppression list; None if nobody was ever erased. One look-up of a file if nobody was."""
    place = erasure_place(settings)
    if place.find(LIST_FILE) is None:
        return None
    try:
        tokens = json.loads(place.read(LIST_FILE))["tokens"]
    except (ValueError, KeyError, TypeError):
        raise TableCorruptionError(
            f"{place.uri}/{LIST_FILE} cannot be read", hint="restore it from a backup: without it erased people come back"
        ) from None
    return Suppression(_read_key(settings, place), tokens)


def own_suppression(settings: Settings) -> Suppression:
    """Return the suppression list, empty if nobody was ever erased. Makes the key if there is none."""
    found = read_suppression(settings)
    if found is not None:
        return found
    place = erasure_place(settings)
    if settings.erasure_key_file is None and place.find(KEY_FILE) is None:
        with durable(Step.SUPPRESSED, 1):
            place.write_private(KEY_FILE, secrets.token_bytes(_KEY_BYTES))
    return Suppression(_read_key(settings, place), {})


def write_suppression(settings: Settings, suppression: Suppression) -> None:
    """Replace the suppression list."""
    with durable(Step.SUPPRESSED):
        data = json.dumps({"tokens": dict(suppression.tokens)}, indent=0, sort_keys=True)
        erasure_place(settings).write_private(LIST_FILE, data.encode())


def _read_key(settings: Settings, place: Place) -> bytes:
    path = settings.erasure_key_file
    try:
        if path is None:
            key, name = place.read(KEY_FILE), f"{place.uri}/{KEY_FILE}"
        else:
            key, name = path.read_bytes(), str(path)
            if path.stat().st_mode & 0o077:
                raise ConfigurationError(f"others can read the key {path} (ADTALLY_ERASURE_KEY_FILE)", hint=f"chmod 600 {path}")
    except OSError as error:
        raise ConfigurationError(
            f"the key of the suppression list cannot be read: {error}",
            hint="restore it from a backup: without it nobody can tell which records are of erased people",
        ) from None
    if len(key) < _KEY_BYTES:
        raise ConfigurationError(f"the key {name} has {len(key)} bytes", hint=f"it needs {_KEY_BYTES} random ones or more")
    return key
