"""Replace the ids of people in lines of records and in other texts, and find what of them is left.

In a record, the value of ``user_id`` is replaced if it is exactly the id. The other fields of the contract stay, because ids of
events, orders, ads and stores are no people. Everything else (unknown fields, lines that are no records) is searched for the id as
a word: a text that equals it or, if it has at least SHORTEST_WORD bytes, contains it between characters that no id has.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import quote

from spark_jobs.ingest.contract.spec import CONTRACTS

USER_FIELD = "user_id"
KEPT_FIELDS = frozenset(spec.name for one in CONTRACTS.values() for spec in one.fields) - {USER_FIELD}
"""The fields of records that say nothing about who the person is; they decide what counts, so they stay."""

SHORTEST_WORD = 6
"""Bytes. A shorter id, such as 17, occurs by chance: it is only replaced where it is a whole text."""

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_STRINGS = re.compile(rb'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'')
_IS_KEY = re.compile(rb"[ \t\r]*:")
_WORDS = re.compile(rb"[A-Za-z0-9_.@+-]{1,512}")
_ESCAPES = re.compile(rb"\\u([0-9a-fA-F]{4})")
_BEFORE, _AFTER = rb"(?<![A-Za-z0-9_-])", rb"(?![A-Za-z0-9_-])"

TokenOf = Callable[[str], str | None]
"""Returns the token of a person, by the id; None for anybody else."""


def is_word(user_id: str) -> bool:
    """Return whether an id is long enough to be looked for within texts."""
    return len(user_id.encode()) >= SHORTEST_WORD


def forms_of(user_id: str) -> set[bytes]:
    """Return the encodings of an id that are looked for: JSON escapes, base64, hex, URL, and the id as it is."""
    plain = user_id.encode()
    codes = [f"{int.from_bytes(unit, 'big'):04x}" for unit in _utf16_units(user_id)]
    texts = {
        json.dumps(user_id)[1:-1],
        json.dumps(user_id, ensure_ascii=False)[1:-1],
        "".join(f"\\u{code}" for code in codes),
        "".join(f"\\u{code.upper()}" for code in codes),
        plain.hex(),
        plain.hex().upper(),
        quote(user_id, safe=""),
        "".join(f"%{byte:02x}" for byte in plain),
        "".join(f"%{byte:02X}" for byte in plain),
        base64.b64encode(plain).decode().rstrip("="),
        base64.urlsafe_b64encode(plain).decode().rstrip("="),
    }
    return {plain, *(text.encode() for text in texts)}


def _utf16_units(text: str) -> list[bytes]:
    data = text.encode("utf-16-be")
    return [data[at : at + 2] for at in range(0, len(data), 2)]


@dataclass(frozen=True)
class People:
    """People to erase: ``tokens`` by id. ``also`` finds tokens of people who were erased before, by whole texts only."""

    tokens: Mapping[str, str] = field(repr=False)
    also: TokenOf | None = None

    def token_of(self, text: str) -> str | None:
        """Return the token that replaces a whole text; None if it is nobody's id."""
        found = self.tokens.get(text)
        return found if found is not None or self.also is None else self.also(text)

    @cached_property
    def _words(self) -> dict[bytes, bytes]:
        return {form: token.encode() for one, token in self.tokens.items() if is_word(one) for form in forms_of(one)}

    @cached_property
    def _pattern(self) -> re.Pattern[bytes]:
        longest_first = sorted(self._words, key=len, reverse=True)
        return re.compile(_BEFORE + rb"(?:" + b"|".join(map(re.escape, longest_first)) + rb")" + _AFTER)

    @cached_property
    def _needles(self) -> list[bytes]:
        short = (json.dumps(one).encode() for one in self.tokens if not is_word(one))
        return [*self._words, *short]

    def may_be_in(self, data: bytes) -> bool:
        """Return whether ``data`` may have one of the ids. False is certain; True is cheap to say and must be looked at."""
        return self.also is not None or b"\\u" in data or any(needle in data for needle in self._needles)

    def words(self, data: bytes) -> bytes:
        """Replace each id that stands in ``data`` as a word, in any of its forms."""
        if not self._words or not any(word in data for word in self._words):
            return data
        return self._pattern.sub(lambda found: self._words[found[0]], data)

    def has_word(self, data: bytes) -> bool:
        """Return whether one of the ids stands in ``data`` as a word, also written with JSON escapes."""
        if not self._words:
            return False
        if any(word in data for word in self._words) and self._pattern.search(data):
            return True
        return b"\\u" in data and self._pattern.search(_unescaped(data)) is not None

    def text(self, text: str) -> str:
        """Replace a text that is an id, or the ids that stand in it as words."""
        token = self.token_of(text)
        if token is not None:
            return token
        data = text.encode("utf-8", "surrogatepass")
        changed = self.words(data)
        return text if changed is data else changed.decode("utf-8", "surrogatepass")


def _unescaped(data: bytes) -> bytes:
    return _ESCAPES.sub(lambda found: chr(int(found[1], 16)).encode("utf-8", "surrogatepass"), data)


def rewrite_line(raw: bytes, people: People) -> bytes:
    """Return a line, or the value of a Kafka record, with the tokens. It stays valid if it was, and every other byte stays."""
    if not people.may_be_in(raw):
        return raw
    try:
        is_record = isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        is_record = False
    return _rewrite_record(raw, people) if is_record else _rewrite_words(rewrite_strings(raw, people), people)


def _rewrite_record(raw: bytes, people: People) -> bytes:
    parts: list[bytes] = []
    done = depth = 0
    key = ""
    for found in _TOKENS.finditer(raw):
        literal = found.group()
        if literal in b"{[":
            depth += 1
        elif literal in b"}]":
            depth -= 1
        else:
            text = json.loads(literal)
            is_key = _IS_KEY.match(raw, found.end()) is not None
            if is_key and depth == 1:
                key = text
            if depth == 1 and (key in KEPT_FIELDS or (is_key and key == USER_FIELD)):
                continue
            changed = (people.token_of(text) or text) if depth == 1 and key == USER_FIELD else people.text(text)
            if changed != text:
                parts += [raw[done : found.start()], json.dumps(changed).encode()]
                done = found.end()
    return b"".join((*parts, raw[done:])) if parts else raw


def rewrite_strings(data: bytes, people: People) -> bytes:
    """Replace ids in the quoted strings of any text, and as words."""
    if not people.may_be_in(data):
        return data

    def rewrite(found: re.Match[bytes]) -> bytes:
        literal = found[0]
        try:
            text = json.loads(literal) if literal[:1] == b'"' else literal[1:-1].decode()
        except ValueError:
            return people.words(literal)
        changed = people.text(text)
        return literal if changed == text else literal[:1] + json.dumps(changed)[1:-1].encode() + literal[:1]

    return people.words(_STRINGS.sub(rewrite, data))


def _rewrite_words(data: bytes, people: People) -> bytes:
    """Replace the words of a broken line that are ids of people who were erased before."""
    if people.also is None:
        return data
    also = people.also
    return _WORDS.sub(lambda found: (also(found[0].decode()) or found[0].decode()).encode(), data)


def rewrite_list(data: bytes, people: People) -> bytes:
    """Rewrite a file that an operator wrote: a list with an id a line, or TOML with quoted ids."""
    lines = rewrite_strings(data, people).split(b"\n")
    for at, line in enumerate(lines):
        word = line.strip()
        try:
            token = people.token_of(word.decode()) if word else None
        except UnicodeDecodeError:
            continue
        if token is not None:
            lines[at] = line.replace(word, token.encode())
    return b"\n".join(lines)


def has_person(raw: bytes, people: People) -> bool:
    """Return whether a line, a value or a text still has one of the ids where it would have been replaced.

    Not by comparing with a rewritten line: what finds ids must not be what replaces them.
    """
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return any(_has_value(record, people, is_top=True))
    quoted = (literal for literal in _STRINGS.findall(raw) for one in people.tokens if literal[1:-1] == one.encode())
    return people.has_word(raw) or next(quoted, None) is not None


def _has_value(value: object, people: People, *, is_top: bool = False) -> Iterable[bool]:
    if isinstance(value, dict):
        for key, content in value.items():
            if is_top and key == USER_FIELD and isinstance(content, str):
                yield content in people.tokens
            elif not (is_top and key in KEPT_FIELDS and not isinstance(content, dict | list)):
                yield from _has_value(key, people)
                yield from _has_value(content, people)
    elif isinstance(value, list):
        for content in value:
            yield from _has_value(content, people)
    elif isinstance(value, str):
        yield value in people.tokens or people.has_word(value.encode("utf-8", "surrogatepass"))
