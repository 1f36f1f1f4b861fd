"""Sends alerts to the log, the file that `adtally up` reads, the webhook of ADTALLY_ALERT_WEBHOOK, and installed notifiers.

A notifier is a class with a name and ``send``. A package provides a factory for it, which takes the settings, under the entry
point group ``adtally.notifiers``:

    [project.entry-points."adtally.notifiers"]
    pager = "our_package.pager:make_notifier"

``make_notifier(settings)`` returns the notifier, or None if these settings do not want it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from http.client import HTTPException, HTTPMessage
from importlib.metadata import entry_points
from typing import IO, Any, Protocol

from spark_jobs.config import Settings

ENTRY_POINTS = "adtally.notifiers"
_ALERTS_BYTES = 1024 * 1024  # a full file is kept as alerts.jsonl.1
_log = logging.getLogger("adtally.alerts")


class AlertSeverity(StrEnum):
    """CRITICAL: a person has to act. INFO: the problem is over."""

    CRITICAL = "critical"
    INFO = "info"


@dataclass(frozen=True)
class Alert:
    """One alert. ``runbook`` is a path in the repository, ``run_id`` the Dagster run that it concerns, if any."""

    name: str
    title: str
    detail: str
    runbook: str
    severity: AlertSeverity = AlertSeverity.CRITICAL
    run_id: str | None = None
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that a webhook receives, times in RFC 3339."""
        return {**asdict(self), "at": f"{self.at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Alert:
        """Return the alert of what ``to_json`` returned."""
        return cls(**{**stored, "severity": AlertSeverity(stored["severity"]), "at": datetime.fromisoformat(stored["at"])})


class Notifier(Protocol):
    """Sends alerts somewhere. If ``send`` raises, the caller continues with the other notifiers."""

    name: str

    def send(self, alert: Alert) -> None:
        """Send an alert."""


class NotDeliveredError(Exception):
    """An alert could not be delivered. The message contains no address, which may be a secret."""


class LogNotifier:
    """Writes to the log ``adtally.alerts``."""

    name = "log"

    def send(self, alert: Alert) -> None:
        """See Notifier."""
        level = logging.ERROR if alert.severity is AlertSeverity.CRITICAL else logging.INFO
        run = f" (run {alert.run_id})" if alert.run_id else ""
        _log.log(level, "%s: %s%s; see %s", alert.title, alert.detail, run, alert.runbook)


class AlertFile:
    """Appends to HOME/logs/alerts.jsonl, whose new lines ``adtally up`` prints."""

    name = "file"

    def __init__(self, settings: Settings) -> None:
        self._path = settings.home_path / "logs" / "alerts.jsonl"

    def send(self, alert: Alert) -> None:
        """See Notifier."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size > _ALERTS_BYTES:
                self._path.replace(self._path.with_suffix(".jsonl.1"))
        with self._path.open("a", encoding="utf-8") as file:  # one write, so that lines of several processes do not mix
            file.write(json.dumps(alert.to_json()) + "\n")

    def newest(self, count: int) -> list[Alert]:
        """Return the newest alerts, the newest first. Skips lines that are not alerts."""
        found: list[Alert] = []
        for path in (self._path, self._path.with_suffix(".jsonl.1")):
            with contextlib.suppress(OSError):
                for line in reversed(path.read_bytes().splitlines()):
                    with contextlib.suppress(ValueError, TypeError, KeyError):
                        found.append(Alert.from_json(json.loads(line)))
                    if len(found) == count:
                        return found
        return found

    def reader(self) -> Callable[[], list[Alert]]:
        """Return a function that returns the alerts appended since its last call, or since now."""
        seen = self._path.stat().st_size if self._path.exists() else 0

        def read() -> list[Alert]:
            nonlocal seen
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # skips lines that are not alerts
                size = self._path.stat().st_size
                seen = seen if seen <= size else 0  # smaller: the file was rotated
                if seen < size:
                    with self._path.open("rb") as file:
                        file.seek(seen)
                        whole = file.read().rpartition(b"\n")[0]
                    seen += len(whole) + 1 if whole else 0
                    return [Alert.from_json(json.loads(line)) for line in whole.splitlines()]
            return []

        return read


class WebhookNotifier:
    """Posts an alert as JSON. Retries, since the receiver may be starting. Follows no redirect and logs no address."""

    name = "webhook"

    def __init__(self, url: str, *, timeout_seconds: float = 5.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self._url, self._timeout, self._sleep = url, timeout_seconds, sleep
        self._opener = urllib.request.build_opener(_NoRedirect)

    def send(self, alert: Alert) -> None:
        """See Notifier. Raises NotDeliveredError after the last try, or at once if a retry cannot help."""
        body = json.dumps(alert.to_json()).encode("utf-8")
        for wait_seconds in (0.5, 1.0, None):
            problem, may_pass = self._post(body)
            if problem is None:
                return
            if not may_pass or wait_seconds is None:
                raise NotDeliveredError(f"the webhook did not take the alert: {problem}")
            self._sleep(wait_seconds)

    def _post(self, body: bytes) -> tuple[str | None, bool]:
        """Return what went wrong, or None, and whether a retry may help."""
        try:
            request = urllib.request.Request(self._url, data=body, headers={"Content-Type": "application/json"}, method="POST")
            with self._opener.open(request, timeout=self._timeout):
                return None, False
        except urllib.error.HTTPError as error:
            with error:
                return f"status {error.code}", error.code >= 500 or error.code in (408, 429)
        except ValueError as error:  # the URL is not valid
            return type(error).__name__, False
        except (OSError, HTTPException) as error:  # the text of some of these contains the address
            return type(getattr(error, "reason", None) or error).__name__, True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def make_notifiers(settings: Settings) -> list[Notifier]:
    """Return the notifiers of these settings. An installed one that cannot be created is logged and skipped."""
    made: list[Notifier] = [LogNotifier(), AlertFile(settings)]
    if settings.alert_webhook is not None:
        made.append(WebhookNotifier(settings.alert_webhook.get_secret_value()))
    for point in entry_points(group=ENTRY_POINTS):
        try:
            notifier = point.load()(settings)
        except Exception:
            _log.exception("notifier %s cannot be made", point.name)
            continue
        if notifier is not None:
            made.append(notifier)
    return made


def notify(alert: Alert, notifiers: Iterable[Notifier], *, only: Collection[str] | None = None) -> list[str]:
    """Send an alert by all notifiers, or by those named in ``only``. Never raises; returns the names of those that failed."""
    failed = []
    for notifier in notifiers:
        if only is not None and notifier.name not in only:
            continue
        try:
            notifier.send(alert)
        except Exception as error:
            # The message of an installed notifier may contain a secret.
            problem = (
                error if isinstance(error, NotDeliveredError) else f"notifier {notifier.name} failed with {type(error).__name__}"
            )
            _log.error("alert %s: %s", alert.name, problem)
            failed.append(notifier.name)
    return failed
