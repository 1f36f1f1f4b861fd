r"""A proxy between clients and a real object store that makes the store misbehave, by rules and a seed.

    with misbehaving(environment, seed=1) as faults:
        faults.rule(Fault.LOST_ANSWER, "PUT", r"_delta_log/0+3\.json$", times=1)
        ...                              # with AWS_ENDPOINT_URL = faults.endpoint_url
    assert faults.injected[Fault.LOST_ANSWER] == 1

A request is passed on as it came, with the Host that the client signed. Only requests of short-lived credentials
(`short_lived_access_key`) are signed anew, by the store's own ones.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

LIST = "LIST"
"""The method by which a rule names a listing; GET then means an object."""
_SHORT_LIVED = "SHORTLIVED"
_ACCESS_KEY = re.compile(r"Credential=([^/]+)/")
_OWN_HEADERS = ("connection", "keep-alive", "transfer-encoding")
_SIGNED_ANEW = ("authorization", "x-amz-date", "x-amz-security-token", "x-amz-content-sha256", "date")
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class Fault(StrEnum):
    """What can go wrong."""

    LOST_ANSWER = "lost answer"  # the store does it, and the connection ends before the answer
    SLOW_ANSWER = "slow answer"  # the store does it, and answers after `seconds`
    SLOW_DOWN = "503 SlowDown"
    SERVER_ERROR = "500 InternalError"
    FORBIDDEN = "403 AccessDenied"
    EXPIRED = "403 ExpiredToken"
    GONE = "404 NoSuchKey"
    CUT = "cut body"  # half of what Content-Length promises
    LAGGING_LIST = "lagging list"  # without objects written after `since`


_ANSWERS = {
    Fault.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Fault.SERVER_ERROR: (500, "InternalError", "We encountered an internal error. Please try again."),
    Fault.FORBIDDEN: (403, "AccessDenied", "Access Denied"),
    Fault.EXPIRED: (403, "ExpiredToken", "The provided token has expired."),
    Fault.GONE: (404, "NoSuchKey", "The specified key does not exist."),
}


@dataclass
class Rule:
    """Meets requests by method (several: ``PUT|POST``) and key. ``share`` of them, ``times`` at most, not the first ``skip``."""

    fault: Fault
    method: re.Pattern[str]
    key: re.Pattern[str]
    share: float = 1.0
    times: int | None = None
    skip: int = 0
    seconds: float = 0.0
    since: float = 0.0
    until: float | None = None


@dataclass
class Faults:
    """The rules, and what was injected so far."""

    endpoint_url: str
    random: Random
    rules: list[Rule] = field(default_factory=list)
    injected: Counter[Fault] = field(default_factory=Counter)
    log: list[tuple[Fault, str, str]] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def rule(
        self,
        fault: Fault,
        method: str = ".*",
        key: str = "",
        *,
        share: float = 1.0,
        times: int | None = None,
        skip: int = 0,
        seconds: float = 0.0,
        since: float = 0.0,
        lasts: float | None = None,
    ) -> Rule:
        """Inject a fault from now on; ``lasts`` seconds, or until `calm`."""
        until = None if lasts is None else time.monotonic() + lasts
        made = Rule(fault, re.compile(method), re.compile(key), share, times, skip, seconds, since, until)
        with self._lock:
            self.rules.append(made)
        return made

    def calm(self) -> None:
        """Inject nothing more."""
        with self._lock:
            self.rules.clear()

    def choose(self, method: str, key: str) -> Rule | None:
        """Return the first rule that meets a request, and count it."""
        with self._lock:
            self.requests[method] += 1
            for rule in self.rules:
                if not (rule.method.fullmatch(method) and rule.key.search(key)) or rule.times == 0:
                    continue
                if rule.until is not None and time.monotonic() > rule.until:
                    continue
                if rule.skip:
                    rule.skip -= 1
                elif self.random.random() < rule.share:
                    if rule.times is not None:
                        rule.times -= 1
                    self._record(rule.fault, method, key)
                    return rule
        return None

    def expired(self, method: str, key: str) -> None:
        """Count a request with credentials that have expired."""
        with self._lock:
            self._record(Fault.EXPIRED, method, key)

    def _record(self, fault: Fault, method: str, key: str) -> None:
        self.injected[fault] += 1
        self.log.append((fault, method, key))


def short_lived_access_key(seconds: float) -> str:
    """Return an access key, of any secret, that the proxy accepts for some seconds."""
    return f"{_SHORT_LIVED}{int((time.time() + seconds) * 1000)}"


@contextmanager
def misbehaving(environment: dict[str, str], seed: int = 0) -> Iterator[Faults]:
    """Run a proxy to the store that ``environment`` names. Without rules it passes everything on."""
    upstream = urllib.parse.urlsplit(environment["AWS_ENDPOINT_URL"]).netloc
    own = Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
    server = _Server(("127.0.0.1", 0), _Handler)
    faults = Faults(f"http://127.0.0.1:{server.server_address[1]}", Random(seed))
    server.faults, server.upstream, server.credentials = faults, upstream, own
    server.region = environment["AWS_REGION"]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    faults: Faults
    upstream: str
    credentials: Credentials
    region: str

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of the proxy."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    _connection: http.client.HTTPConnection | None = None

    def log_message(self, format: str, *args: object) -> None:
        """Faults are logged in `Faults.log`."""

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        if self._connection is not None:
            self._connection.close()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(target.query, keep_blank_values=True)
        key = urllib.parse.unquote(target.path).lstrip("/")
        method = self.command
        if method == "GET" and "list-type" in query:
            method, key = LIST, f"{key}/{query.get('prefix', [''])[0]}"
        if "partNumber" in query:
            key = f"{key}?part={query['partNumber'][0]}"
        access_key = _ACCESS_KEY.search(self.headers.get("Authorization", ""))
        is_short = access_key is not None and access_key[1].startswith(_SHORT_LIVED)
        if is_short and access_key is not None and int(access_key[1].removeprefix(_SHORT_LIVED)) < time.time() * 1000:
            self.server.faults.expired(method, key)
            self._refuse(Fault.EXPIRED, key)
            return
        rule = self.server.faults.choose(method, key)
        if rule is not None and rule.fault in _ANSWERS:
            self._refuse(rule.fault, key)
            return
        status, reason, headers, data = self._ask(body, sign=is_short)
        if rule is None:
            self._answer(status, reason, headers, data)
        elif rule.fault is Fault.LOST_ANSWER:
            self._drop()
        elif rule.fault is Fault.SLOW_ANSWER:
            time.sleep(rule.seconds)
            self._answer(status, reason, headers, data)
        elif rule.fault is Fault.CUT:
            self._answer(status, reason, headers, data, cut=True)
        else:
            assert rule.fault is Fault.LAGGING_LIST
            self._answer(status, reason, headers, _without_young(data, rule.since))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _ask(self, body: bytes, *, sign: bool) -> tuple[int, str, list[tuple[str, str]], bytes]:
        headers = [(name, value) for name, value in self.headers.items() if name.lower() not in _OWN_HEADERS]
        if sign:
            kept = {name: value for name, value in headers if name.lower() not in _SIGNED_ANEW}
            request = AWSRequest(self.command, f"http://{self.headers['Host']}{self.path}", kept, body)
            request.context["payload_signing_enabled"] = False
            S3SigV4Auth(self.server.credentials, "s3", self.server.region).add_auth(request)
            headers = list(request.headers.items())
        for _ in range(2):  # the store may have closed a connection that waited
            if self._connection is None:
                self._connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
                self._connection.connect()
                self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self._connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in headers:
                    self._connection.putheader(name, value)
                self._connection.endheaders(body or None)
                answer = self._connection.getresponse()
                return answer.status, answer.reason, answer.getheaders(), answer.read()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self._connection.close()
                self._connection = None
        return 502, "Bad Gateway", [], b""

    def _answer(self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in (*_OWN_HEADERS, "content-length"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._drop()

    def _refuse(self, fault: Fault, key: str) -> None:
        status, code, message = _ANSWERS[fault]
        xml = f"<Error><Code>{code}</Code><Message>{message}</Message><Key>{key}</Key></Error>"
        data = b"" if self.command == "HEAD" else f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode()
        self._answer(status, code, [("Content-Type", "application/xml")], data)

    def _drop(self) -> None:
        """End the connection to the client."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def _without_young(data: bytes, since: float) -> bytes:
    """Return a listing without the objects that were written after a time."""
    ET.register_namespace("", _NAMESPACE)
    root = ET.fromstring(data)
    for entry in [found for found in root if found.tag.endswith("Contents")]:
        modified = next(part.text for part in entry if part.tag.endswith("LastModified"))
        if datetime.fromisoformat(str(modified).replace("Z", "+00:00")).timestamp() > since:
            root.remove(entry)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))
