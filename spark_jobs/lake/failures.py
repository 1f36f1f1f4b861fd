"""Turns the errors of the clients of an object store (obstore, delta-rs, DuckDB) into one StoreError.

The clients retry what a store refuses for a moment (503, 500, a lost connection) themselves, for `store.RETRY_SECONDS`. Not all of
them retry an answer that was cut off: `read_again` repeats such a reading.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import duckdb
from deltalake.exceptions import DeltaError
from obstore.exceptions import BaseError, InvalidPathError

from spark_jobs.errors import StoreError
from spark_jobs.failure import one_line
from spark_jobs.lake import store

_CLIENT_ERRORS = (DeltaError, BaseError, OSError, duckdb.Error)  # they have other causes, too
_READINGS = 4
_FIRST_WAIT_SECONDS = 0.2
_TREE = re.compile(r"\x1b\[[0-9;]*m|↳")  # delta-rs prints the causes of an error as a coloured tree
_OF_STORE = re.compile(
    r"Generic S3 error|Error performing \w+ http|Server returned non-2xx|HTTP Error:|for HTTP (?:GET|HEAD|PUT|POST) to '"
    r"|Could not establish connection"
)
_REQUEST = re.compile(
    r"performing (?P<method>[A-Z]+) (?P<url>https?://\S+)|HTTP (?P<verb>GET|HEAD|PUT|POST|DELETE)[^']*'(?P<place>\w+://[^']+)'"
)
_STATUS = re.compile(r"(?:\bHTTP |code: |\b)(?P<code>[45]\d\d)(?: (?P<words>[A-Z][A-Za-z]+(?: [A-Z][A-Za-z]+)*)| for HTTP)")
_ANSWERS = (  # of the store itself, in XML, and as DuckDB prints it
    re.compile(r"<Code>(?P<code>\w+)</Code>(?:\s*<Message>(?P<message>[^<]*)</Message>)?"),
    re.compile(r"\(HTTP \d+ [\w ]+\)\s*\n+(?P<code>[A-Z]\w+): (?P<message>[^\n]*)"),
)
_RETRIES = re.compile(r"after (\d+) retr")
_REASONS = (
    (r"body error|end of file before message|Incomplete(?:Body|Message)|partial file|Connection reset", "the answer was cut off"),
    (r"timed out|TimedOut|Timeout was reached", "no answer in time"),
    (r"onnection refused|onnect error|ConnectError|establish connection|connect to server", "no connection to the store"),
    (r"error sending request|returned nothing", "the connection was lost"),
)
_HINTS = {
    "401": "the store does not accept the credentials",
    "403": "the store does not accept the credentials, or they have no right to this key",
}
_RUNBOOK = "docs/runbooks/object-store.md"
_MISSING = ("NoSuchKey", "NotFound")
_PASSING = (
    "ExpiredToken",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
)  # newer credentials, or a later request, may be accepted
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Failure:
    """A request that failed: which, the status of the answer, the store's own code (as NoSuchKey), and why."""

    request: str
    status: str
    code: str
    reason: str

    @property
    def is_missing(self) -> bool:
        """Return whether the store only said that an object is not there."""
        return self.status == "404" and self.code in ("", *_MISSING)

    def error(self) -> StoreError:
        """Return the failure as an error."""
        hint = f"{_HINTS[self.status]}: {_RUNBOOK}" if self.status in _HINTS else _RUNBOOK
        made = StoreError(f"{self.request} failed: {self.reason}", hint=hint)
        made.retryable = self.code in _PASSING or self.status not in ("400", "401", "403", "404")
        return made


def _parse(error: BaseException, operation: str, place: str) -> _Failure | None:
    """Return what an error says about a request to a store; None if it is about something else."""
    whole = str(error)
    text = _TREE.sub(" ", whole).partition("Debug source:")[0]
    if not (isinstance(error, BaseError) or _OF_STORE.search(text)):
        return None
    status = _STATUS.search(text)
    answer = next((found for pattern in _ANSWERS if (found := pattern.search(text))), None)
    code = "" if status is None else status["code"]
    if answer is not None:
        reason = f"{code} {answer['code']}: {answer['message'] or ''}".strip(" :.")
    elif status is not None:
        reason = f"{code} {status['words'] or ''}".strip()
    else:
        last = " ".join(text.split()).rpartition(" - ")[2]
        reason = next((words for pattern, words in _REASONS if re.search(pattern, whole)), last)
    retries = _RETRIES.search(text)
    after = f", after {retries[1]} retries" if retries is not None else ""
    request = f"{operation} {place}" if isinstance(error, BaseError) else _request(text, operation, place)
    return _Failure(request, code, "" if answer is None else answer["code"], f"{one_line(reason)}{after}")


def _request(text: str, operation: str, place: str) -> str:
    """Return the operation and the key of a request, as the client names it."""
    found = _REQUEST.search(" ".join(text.split()))
    if found is None:
        return f"{operation} {place}"
    url = urlsplit(found["url"] or found["place"])
    key = unquote((f"{url.netloc}{url.path}" if url.scheme.startswith("s3") else url.path).strip("/"))
    prefix = parse_qs(url.query).get("prefix")
    if prefix is not None:
        return f"list s3://{key}/{prefix[0]}"
    return f"{(found['method'] or found['verb']).lower()} s3://{key}"


def describe_error(error: BaseException) -> str:
    """Return what a client's error says on one line: without colours, without the text of the store's answer."""
    found = _parse(error, "", "")
    return one_line(error) if found is None else f"{found.request} failed: {found.reason}"


@contextmanager
def translate_store_errors(operation: str, place: str) -> Iterator[None]:
    """Raise what a client raises because of a store as StoreError, or FileNotFoundError if obstore does not find ``place``.

    All other errors pass, also those of delta-rs and DuckDB about a missing object: only the caller knows what it means. The
    message names the request that failed, if the client does; else ``operation`` on ``place``.
    """
    try:
        yield
    except _CLIENT_ERRORS as error:
        found = _parse(error, operation, place)
        if found is None:
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "there is no such object", place) from None
        if found.is_missing and not isinstance(error, BaseError):
            raise
        made = found.error()
        made.retryable &= not isinstance(error, InvalidPathError)
        raise made from error


def store_failure(text: str) -> StoreError | None:
    """Return what another program (dbt) printed about a request to a store as an error; None if it is about something else."""
    found = _parse(Exception(text), "read", "the lakehouse")
    return None if found is None or found.is_missing else found.error()


def read_again(reading: Callable[[], _T]) -> _T:
    """Return what ``reading`` returns. Repeats it if its StoreError may pass, up to 4 times in `store.RETRY_SECONDS`."""
    end = time.monotonic() + store.RETRY_SECONDS
    wait = _FIRST_WAIT_SECONDS
    for left in reversed(range(_READINGS)):
        try:
            return reading()
        except StoreError as error:
            if not left or not error.retryable or time.monotonic() + wait > end:
                raise
        time.sleep(wait)
        wait *= 2
    raise AssertionError
