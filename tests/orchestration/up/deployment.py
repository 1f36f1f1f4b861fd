"""Runs a real ``adtally up`` on its own home, and reads what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr
from terminal import PROGRAM, environment

from orchestration.up.graphql import Webserver, WebserverError

START_SECONDS = 300

_RUNS = """
{ runsOrError(limit: 200) { __typename ... on Runs { results { runId jobName status } } } }
"""
_LAUNCH = """
mutation Launch($job: String!) {
  launchRun(executionParams: {mode: "default", runConfigData: {}, selector: {
      repositoryLocationName: "adtally", repositoryName: "__repository__", jobName: $job}}) {
    __typename ... on PythonError { message } ... on LaunchRunSuccess { run { runId } } } }
"""
_ASSET = """
query Asset($path: [String!]!) {
  assetNodeOrError(assetKey: {path: $path}) { __typename
    ... on AssetNode {
      partitionStats { numMaterialized numFailed numPartitions }
      assetMaterializations(limit: 500) { partition metadataEntries { label ... on IntMetadataEntry { intValue } } }
      assetChecksOrError { __typename ... on AssetChecks { checks { name executionForLatestMaterialization { status } } } } } } }
"""


def processes_of(home: Path) -> list[psutil.Process]:
    """Return every living process that was started for this home."""
    found = []
    for process in psutil.process_iter():
        try:
            of_home = process.environ().get("ADTALLY_HOME") == str(home)
            if of_home and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


class Deployment:
    """An ``adtally up`` in a context, whose end kills what still runs. A test that passes has ended it before."""

    def __init__(self, home: Path, *arguments: str, **changes: str) -> None:
        self.home = home
        self.lines: list[str] = []
        self._arguments, self._changes = arguments, changes

    def __enter__(self) -> Deployment:
        self.process = subprocess.Popen(
            [*PROGRAM, "--home", str(self.home), "up", "--port", "0", *self._arguments],
            env=environment(**self._changes),
            cwd=self.home.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for left in processes_of(self.home):
            left.kill()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, what: str, true: Callable[[], bool], *, seconds: float) -> None:
        """Wait until it is true. If that takes too long, fail with the printed lines and the ends of the logs."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if true():
                    return
            except WebserverError as error:
                if time.monotonic() > deadline:
                    raise AssertionError(self.report(f"{what}: {error}")) from None
            assert self.process.poll() is None, self.report(f"{what}: adtally up has ended with {self.process.returncode}")
            assert time.monotonic() < deadline, self.report(f"{what}: not within {seconds} s")
            time.sleep(0.5)

    def report(self, problem: str) -> str:
        """Return a problem with the lines that were printed and logged before it."""
        lines = [problem, *self.lines]
        for log in sorted((self.home / "logs").glob("*.log")):
            lines += [f"--- {log.name}", *log.read_text("utf-8", "replace").splitlines()[-25:]]
        return "\n".join(lines)

    def said(self, text: str) -> list[str]:
        """Return the lines that contain a text."""
        return [line for line in self.lines if text in line]

    def wait_until_ready(self) -> Webserver:
        """Return the webserver once its address was printed."""
        self.wait_for("the addresses", lambda: bool(self.said("Ctrl-C ends all of it.")), seconds=START_SECONDS)
        address = re.search(r"UI +(http://127\.0\.0\.1:\d+)", "\n".join(self.lines))
        assert address is not None, self.report("no address")
        token = self._changes.get("ADTALLY_WEBSERVER_TOKEN")
        return Webserver(address[1], token=SecretStr(token) if token else None)

    def end(self, number: signal.Signals = signal.SIGINT, *, seconds: float = 240) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        os.kill(self.process.pid, number)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.report(f"has not ended within {seconds} s")) from None
        self._reader.join(10)
        return status


def runs(webserver: Webserver) -> list[dict[str, str]]:
    """Return every run: runId, jobName, status."""
    found: list[dict[str, str]] = webserver.ask(_RUNS)["runsOrError"]["results"]
    return found


def launch(webserver: Webserver, job: str) -> str:
    """Start a job as a person does in the UI; return the run's id."""
    launched = webserver.ask(_LAUNCH, job=job)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    return str(launched["run"]["runId"])


def asset(webserver: Webserver, name: str) -> dict[str, Any]:
    """Return what Dagster knows of an asset: partitionStats, assetMaterializations, checks."""
    node: dict[str, Any] = webserver.ask(_ASSET, path=[name])["assetNodeOrError"]
    assert node["__typename"] == "AssetNode", node
    return node
