"""Notifiers, against a real HTTP server."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from orchestration.alerts import notifier as module
from orchestration.alerts.notifier import (
    Alert,
    AlertFile,
    AlertSeverity,
    LogNotifier,
    NotDeliveredError,
    WebhookNotifier,
    make_notifiers,
    notify,
)
from spark_jobs.config import load_settings

ALERT = Alert(
    name="stream_lag",
    title="stream_lag is over its threshold",
    detail="events: 3 files wait",
    severity=AlertSeverity.CRITICAL,
    runbook="docs/runbooks/stream-lag.md",
    run_id="r-1",
    at=datetime(2025, 6, 2, 10, tzinfo=UTC),
)


class Hook(ThreadingHTTPServer):
    """Answers with the statuses of ``answers`` in turn, the last for ever, and keeps what it got. A number of seconds: hangs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[int | float] = [200]
        self.got: list[dict[str, Any]] = []
        self.ended = threading.Event()

    def url(self, path: str = "/hook?token=secret-token") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append({"path": self.path, "type": self.headers["Content-Type"], "body": body})
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if isinstance(answer, float):
            self.server.ended.wait(answer)
            return
        self.send_response(answer)
        if answer == 302:
            self.send_header("Location", self.server.url("/elsewhere"))
        self.end_headers()

    def do_GET(self) -> None:
        self.server.got.append({"path": self.path})
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def webhook(hook: Hook, **options: Any) -> tuple[WebhookNotifier, list[float]]:
    waits: list[float] = []
    return WebhookNotifier(hook.url(), sleep=waits.append, **options), waits


def test_a_webhook_gets_the_alert_as_json(hook: Hook) -> None:
    made, waits = webhook(hook)
    made.send(ALERT)
    assert waits == []
    assert hook.got == [
        {
            "path": "/hook?token=secret-token",
            "type": "application/json",
            "body": {
                "name": "stream_lag",
                "title": "stream_lag is over its threshold",
                "detail": "events: 3 files wait",
                "severity": "critical",
                "runbook": "docs/runbooks/stream-lag.md",
                "run_id": "r-1",
                "at": "2025-06-02T10:00:00.000000Z",
            },
        }
    ]
    assert Alert.from_json(hook.got[0]["body"]) == ALERT


@pytest.mark.parametrize(
    ("answers", "tries", "problem"),
    [
        pytest.param([503, 429, 200], 3, None, id="well at the third try"),
        pytest.param([500], 3, "status 500", id="never well"),
        pytest.param([404], 1, "status 404", id="another try cannot help"),
        pytest.param([302], 1, "status 302", id="a redirect is not followed"),
        pytest.param([5.0], 3, "TimeoutError", id="hangs"),
    ],
)
def test_a_webhook_is_tried_again(hook: Hook, answers: list[int | float], tries: int, problem: str | None) -> None:
    hook.answers = answers
    made, waits = webhook(hook, timeout_seconds=0.2)
    if problem is None:
        made.send(ALERT)
    else:
        with pytest.raises(NotDeliveredError, match=problem):
            made.send(ALERT)
    assert [each["path"] for each in hook.got] == ["/hook?token=secret-token"] * tries
    assert waits == [0.5, 1.0][: tries - 1]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/secret-token", "secret-token", "http://[secret-token", "http://h\u0000/secret-token"]
)
def test_nothing_is_raised_and_no_secret_is_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert notify(ALERT, [WebhookNotifier(url, sleep=lambda seconds: None), LogNotifier()]) == ["webhook"]
    assert "secret-token" not in caplog.text
    assert "the webhook did not take the alert" in caplog.text
    assert "stream_lag is over its threshold: events: 3 files wait (run r-1); see docs/runbooks/stream-lag.md" in caplog.text


class Broken:
    name = "broken"

    def send(self, alert: Alert) -> None:
        raise RuntimeError("secret-token")


def test_one_that_fails_does_not_keep_the_others_from_telling(hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    made, _ = webhook(hook)
    assert notify(ALERT, [Broken(), made]) == ["broken"]
    assert len(hook.got) == 1
    assert "notifier broken failed with RuntimeError" in caplog.text
    assert "secret-token" not in caplog.text
    assert notify(replace(ALERT, title="again"), [Broken(), made], only=["broken"]) == ["broken"]
    assert len(hook.got) == 1


def test_what_is_appended_is_read_once_and_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AlertFile(load_settings(home=tmp_path))
    file.send(replace(ALERT, title="before"))
    read = file.reader()
    assert read() == []
    file.send(ALERT)
    file.send(replace(ALERT, title="again", run_id=None))
    assert [alert.title for alert in read()] == [ALERT.title, "again"]
    assert read() == []
    with (tmp_path / "logs" / "alerts.jsonl").open("a") as somebody:
        somebody.write("no alert\n")
    assert read() == []
    monkeypatch.setattr(module, "_ALERTS_BYTES", 100)
    file.send(replace(ALERT, title="in a new file"))
    assert [alert.title for alert in read()] == ["in a new file"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["alerts.jsonl", "alerts.jsonl.1"]


def test_settings_choose_the_notifiers(tmp_path: Path) -> None:
    assert [each.name for each in make_notifiers(load_settings(home=tmp_path))] == ["log", "file"]
    settings = load_settings(home=tmp_path, alert_webhook="http://127.0.0.1:1/secret-token")
    assert [each.name for each in make_notifiers(settings)] == ["log", "file", "webhook"]
    assert "secret-token" not in repr(settings)


def make_broken(settings: object) -> Broken:
    return Broken()


def not_wanted(settings: object) -> None:
    return None


def test_installed_notifiers_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    names = {"pager": "make_broken", "other": "not_wanted", "gone": "no_such_name"}
    points = [EntryPoint(name, f"{__name__}:{value}", module.ENTRY_POINTS) for name, value in names.items()]
    monkeypatch.setattr(module, "entry_points", lambda group: [point for point in points if point.group == group])
    assert [each.name for each in make_notifiers(load_settings(home=tmp_path))] == ["log", "file", "broken"]
    assert "notifier gone cannot be made" in caplog.text
