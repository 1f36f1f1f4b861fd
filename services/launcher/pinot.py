"""Runs Pinot for trials and tests: ZooKeeper, and controller, broker and server in one process."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

from services.launcher.errors import PartitionIdleError, PinotQueryError, ServiceError
from services.launcher.java_service import JavaService
from services.launcher.service import Program, Progress, Role, Status, silent

USER = "adtally"
"""The user of the Pinot that is started here."""

_ANSWER_SECONDS = 10.0
_ACCESS_DENIED = 180
# Pinot is on loopback: ignore a proxy of the environment
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Pinot(JavaService):
    """One of each part. Its data depends on its ports, because Pinot names its instances by them."""

    name = "pinot"
    role_names = ("zookeeper", "pinot")
    port_uses = ("zookeeper", "controller", "broker", "server", "server_admin")
    # after a kill the new processes wait until ZooKeeper drops the sessions of the old ones
    ready_seconds = 180.0
    default_heap = "2g"
    ports_are_kept = True
    warning = (
        "for trials and tests: the port by which its broker asks its server is open on all interfaces, though only to who has the "
        "key of this installation; everything else is on loopback, and controller and broker ask for its password"
    )

    _mends = False

    def up(self, progress: Progress = silent, *, fresh: bool = False, wanted_ports: dict[str, int] | None = None) -> Status:
        """Start as any service does. Partitions that nothing reads are read again."""
        self._mends = True
        try:
            return super().up(progress, fresh=fresh, wanted_ports=wanted_ports)
        finally:
            self._mends = False

    def secrets(self, program: Program, ports: dict[str, int]) -> dict[str, str]:
        """Return a key pair and a password, created once. Raises ServiceError if Java's keytool is missing or fails.

        Broker and server identify each other by the key pair, because the server's port cannot be bound to loopback. Controller and
        broker require the password, because they answer web pages of any origin.
        """
        keys, word = self.folder / "keys.p12", self.folder / "keys.password"
        if not (keys.exists() and word.exists()):
            keys.unlink(missing_ok=True)
            _write_password(word)
            command = [str(program.executable.resolve().with_name("keytool")), "-genkeypair", "-alias", "pinot", "-keyalg", "EC"]
            command += ["-validity", "36500", "-dname", "CN=127.0.0.1", "-storetype", "PKCS12"]
            command += ["-keystore", str(keys), "-storepass:env", "KEYS_PASSWORD"]
            environment = os.environ | {"KEYS_PASSWORD": word.read_text("utf-8")}  # all users can read a command line
            try:
                subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                raise ServiceError(f"a key for Pinot could not be made: {error}", hint="Java's keytool makes it") from None
        if not self._password_path.exists():
            _write_password(self._password_path)
        login = self._login
        return {"keys": str(keys), "password": word.read_text("utf-8"), "login": _basic(login), "login_password": login[1]}

    def roles(self, ports: dict[str, int]) -> list[Role]:
        """Return ZooKeeper first: the other parts register there."""
        manager = ("org.apache.pinot.tools.admin.PinotAdministrator", "StartServiceManager", "-clusterName", "adtally")
        where = ("-zkAddress", f"127.0.0.1:{ports['zookeeper']}", "-port", "-1", "-bootstrapConfigPaths")
        parts = tuple(str(self._conf / f"{part}.conf") for part in ("controller", "broker", "server"))
        zookeeper = ("org.apache.zookeeper.server.ZooKeeperServerMain", str(self._conf / "zoo.cfg"))
        return [
            Role("zookeeper", zookeeper, ("-Xmx256m",), stop_seconds=20.0),
            Role(
                "pinot",
                (*manager, *where, *parts),
                ("-Xms256m", f"-Xmx{self._heap}", "-Dzk.session.timeout=12000"),
                stop_seconds=60.0,
            ),
        ]

    @property
    def _password_path(self) -> Path:
        return self.folder / "login.password"

    @property
    def _login(self) -> tuple[str, str]:
        return USER, self._password_path.read_text("utf-8")

    def _client(self, addresses: dict[str, str]) -> PinotClient:
        return PinotClient(addresses["controller"], addresses["broker"], self._login if self._password_path.exists() else None)

    def addresses(self, ports: dict[str, int]) -> dict[str, str]:
        """Return the URLs of controller and broker."""
        return {use: f"http://127.0.0.1:{ports[use]}" for use in ("controller", "broker")}

    def holds(self, ports: dict[str, int]) -> dict[str, int]:
        """Return the number of rows by table."""
        client = self._client(self.addresses(ports))
        return {table: int(client.query(f'select count(*) from "{table}"')[0][0]) for table in sorted(client.tables())}

    def status(self) -> Status:
        """Return the status as of any service. A table that lacks messages is a problem too, although it answers."""
        found = super().status()
        if not found.running or found.problem:
            return found
        client = self._client(found.addresses)
        for table in sorted(found.holds):
            for partition, first, end in client.lost(table):
                lacks = f"table {table} lacks messages {first} to {end - 1} of partition {partition}"
                cure = "`adtally publish --whole`, then `adtally services pinot up --fresh`"
                return replace(found, problem=f"{lacks}, which were gone before it read them: {cure}")
        return found

    @property
    def client(self) -> PinotClient:
        """Return a client of this Pinot. Raises ServiceError unless it runs."""
        return self._client(self.running_addresses())

    def probe(self, role: str, ports: dict[str, int]) -> str | None:
        """Require that ZooKeeper takes connections, that every part of Pinot is alive and that every table answers a query."""
        if role == "zookeeper":
            try:
                socket.create_connection(("127.0.0.1", ports["zookeeper"]), timeout=_ANSWER_SECONDS).close()
            except OSError as error:
                return f"port {ports['zookeeper']}: {error.strerror or error}"
            return None
        try:
            client = self._client(self.addresses(ports))
            return client.missing(f"http://127.0.0.1:{ports['server_admin']}", mends=self._mends)
        except ServiceError as error:
            return str(error)


@dataclass(frozen=True)
class Answer:
    """Column names and rows of a query in Pinot's JSON: sums are floats, exact sums (SUMPRECISION) are texts."""

    columns: list[str]
    rows: list[list[Any]]


class PinotClient:
    """A client of controller and broker by HTTP. Every method raises ServiceError if Pinot refuses or does not answer.

    ``login``: user and password, if Pinot requires them.
    """

    def __init__(self, controller: str, broker: str, login: tuple[str, str] | None = None) -> None:
        self.controller, self.broker = controller, broker
        self._headers = {"Authorization": _basic(login)} if login else {}

    def _call(
        self, url: str, body: object = None, *, is_json: bool = True, method: str | None = None, or_none: bool = False
    ) -> Any:
        """Return Pinot's answer; with ``or_none`` None for 404."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | self._headers
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        try:
            with _OPENER.open(request, timeout=_ANSWER_SECONDS) as answer:
                text = answer.read().decode("utf-8")
                return json.loads(text) if is_json else text
        except urllib.error.HTTPError as error:
            if or_none and error.code == 404:
                return None
            said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
            raise ServiceError(f"{url.split('?')[0]} answered {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise ServiceError(f"{url.split('?')[0]} does not answer: {getattr(error, 'reason', error)}") from None

    def ask(self, sql: str) -> Answer:
        """Return the complete answer to a query.

        Raises PinotQueryError if Pinot refuses the statement, ServiceError if it does not answer or the answer is incomplete.
        """
        answer = self._call(f"{self.broker}/query/sql", {"sql": sql})
        if answer.get("exceptions"):
            found = answer["exceptions"][0]
            code = int(found.get("errorCode") or 0)
            message = "it needs a login that may do this" if code == _ACCESS_DENIED else str(found.get("message"))
            raise PinotQueryError(_reason(message), code=code)
        if answer.get("numServersResponded") != answer.get("numServersQueried"):
            raise ServiceError("query failed: not every server answered")
        if answer.get("numGroupsLimitReached"):
            raise ServiceError("query failed: it has more groups than Pinot keeps, so it would leave some out", hint="filter it")
        table = answer.get("resultTable") or {}
        columns = [str(name) for name in (table.get("dataSchema") or {}).get("columnNames") or []]
        return Answer(columns, table.get("rows") or [])

    def query(self, sql: str) -> list[list[Any]]:
        """Return the rows of a query. Raises as `ask`."""
        return self.ask(sql).rows

    def tables(self) -> list[str]:
        """Return the names of the tables, without their type."""
        return list(self._call(f"{self.controller}/tables")["tables"])

    def schema(self, name: str) -> dict[str, Any] | None:
        """Return a schema; None if there is none."""
        found: dict[str, Any] | None = self._call(f"{self.controller}/schemas/{name}", or_none=True)
        return found

    def put_schema(self, schema: dict[str, Any]) -> None:
        """Create or replace a schema."""
        self._call(f"{self.controller}/schemas?override=true", schema)

    def table(self, name: str) -> dict[str, Any] | None:
        """Return the configuration of a realtime table; None if there is none."""
        found: dict[str, Any] | None = (self._call(f"{self.controller}/tables/{name}", or_none=True) or {}).get("REALTIME")
        return found

    def add_table(self, config: dict[str, Any]) -> None:
        """Create a table, whose schema must exist."""
        self._call(f"{self.controller}/tables", config)

    def put_table(self, config: dict[str, Any]) -> None:
        """Replace the configuration of a table. Segments that are being consumed keep the old one."""
        self._call(f"{self.controller}/tables/{config['tableName']}", config, method="PUT")

    def reload(self, table: str) -> None:
        """Make the servers reload a table's segments with its present schema and configuration."""
        self._call(f"{self.controller}/segments/{table}/reload?type=REALTIME", {})

    def force_commit(self, table: str) -> None:
        """Commit the segments that are being consumed, and continue in new ones."""
        self._call(f"{self.controller}/tables/{table}/forceCommit", {}, is_json=False)

    def pause(self, table: str) -> None:
        """Commit the segments that are being consumed, and stop consuming."""
        self._call(f"{self.controller}/tables/{table}/pauseConsumption", {})

    def resume(self, table: str) -> None:
        """Consume again, with the present configuration."""
        self._call(f"{self.controller}/tables/{table}/resumeConsumption", {})

    def consuming_segments(self, table: str) -> list[str]:
        """Return the segments that are being consumed."""
        return sorted(self._call(f"{self.controller}/tables/{table}/pauseStatus").get("consumingSegments") or [])

    def segments(self, table: str) -> dict[str, str]:
        """Return the status (IN_PROGRESS, DONE) of each realtime segment of a table."""
        return {name: str(held.get("segment.realtime.status")) for name, held in self._segments(table).items()}

    def lost(self, table: str) -> list[tuple[int, int, int]]:
        """Return messages that the topic lost before Pinot read them, as (partition, first offset, end offset).

        Pinot skips them after a minute and notes it only in its log. But each segment should begin where the previous one of the
        partition ended, or began, if Pinot gave that one up.
        """
        by_partition: dict[int, list[tuple[int, int, int]]] = {}
        for name, held in self._segments(table).items():
            partition, sequence = (int(part) for part in name.rsplit("__", 3)[1:3])
            start = int(held["segment.realtime.startOffset"])
            is_done = held.get("segment.realtime.status") == "DONE"
            end = int(held["segment.realtime.endOffset"]) if is_done else start
            by_partition.setdefault(partition, []).append((sequence, start, end))
        return [
            (partition, end, start)
            for partition, found in sorted(by_partition.items())
            for (_, _, end), (_, start, _) in pairwise(sorted(found))
            if start > end
        ]

    def _segments(self, table: str) -> dict[str, dict[str, Any]]:
        return {name: self._call(f"{self.controller}/segments/{table}/{name}/metadata") for name in self._segment_names(table)}

    def _segment_names(self, table: str) -> list[str]:
        parts = self._call(f"{self.controller}/segments/{table}?type=REALTIME")
        return [name for part in parts for name in part.get("REALTIME", [])]

    def consumed(self, table: str) -> dict[int, int]:
        """Return the end offset up to which Pinot has read each partition of a table's topic.

        Raises ServiceError if Pinot has stopped reading a partition, PartitionIdleError if no segment is assigned to it.
        """
        found = self._call(f"{self.controller}/tables/{table}/consumingSegmentsInfo?type=REALTIME")
        offsets: dict[int, int] = {}
        for segment, consumers in found["_segmentToConsumingInfoMap"].items():
            for consumer in consumers:
                if consumer["consumerState"] != "CONSUMING":
                    raise ServiceError(f"table {table} has stopped reading its topic at segment {segment}")
                offsets |= {int(partition): int(offset) for partition, offset in consumer["partitionToOffsetMap"].items()}
        idle = {int(name.rsplit("__", 3)[1]) for name in self._segment_names(table)} - offsets.keys()
        if idle and not self._call(f"{self.controller}/tables/{table}/pauseStatus").get("pauseFlag"):
            raise PartitionIdleError(
                f"table {table} does not read partition {min(idle)} of its topic",
                hint="`adtally services pinot up` has it read again",
            )
        return offsets

    def missing(self, server_admin: str, *, mends: bool = False) -> str | None:
        """Return None if every part lives and every table answers and reads, else what does not.

        With ``mends`` make Pinot read idle partitions again. A kill between two segments leaves such partitions, and Pinot itself
        looks for them only once an hour.
        """
        live = self._call(f"{self.controller}/instances")["instances"]
        for part in ("Controller_", "Broker_", "Server_"):
            if not any(name.startswith(part) for name in live):
                return f"{part.rstrip('_').lower()} is not registered"
        self._call(f"{server_admin}/health/readiness", is_json=False)
        self.query("select 1")
        for table in self.tables():
            self.query(f'select count(*) from "{table}"')
            self._require_reading(table, mends=mends)
        return None

    def _require_reading(self, table: str, *, mends: bool) -> None:
        """Require that a table reads its topic: queries answer even where reading has stopped. A hand-over may look like a stop."""
        for pause in (0.5, 2.0, 5.0):
            with contextlib.suppress(ServiceError):
                self.consumed(table)
                return
            time.sleep(pause)
        try:
            self.consumed(table)
        except PartitionIdleError:
            if not mends:
                raise
            self.resume(table)
            time.sleep(5.0)
        self.consumed(table)


def _reason(message: str) -> str:
    """Return the sentence of Pinot's message that names the problem, without its stack trace."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.strip().startswith(("at ", "..."))]
    told = [line for line in lines if line.startswith("Caused by: ") or "Exception: " in line] or lines or ["no reason given"]
    return re.sub(r"^(Caused by: )?([\w$]+\.)*[\w$]+(Exception|Error): ", "", told[-1])[:300]


def _write_password(path: Path) -> None:
    """Write a new password that only the user can read; the file appears only when it is complete."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_text(token_urlsafe(24), "utf-8")
    new.replace(path)


def _basic(login: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(login).encode()).decode("ascii")
