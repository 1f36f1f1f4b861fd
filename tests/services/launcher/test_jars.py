"""The locks of the services, and what is made of a jar that is not the one pinned. Nothing here asks a network."""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from services.launcher import jars
from services.launcher.jars import CONF, Jar, JarLock, ensure_jars, read_lock
from spark_jobs.errors import MachineError

NO_JAVA = Path("/bin/false")


def made(cache: Path, *contents: bytes) -> JarLock:
    """A lock of small jars that lie in the cache."""
    pinned = tuple(
        Jar("org.example", f"part{n}", "1.0", None, len(content), hashlib.sha256(content).hexdigest())
        for n, content in enumerate(contents)
    )
    lock = JarLock("example", "1.0", pinned)
    folder = cache / f"example-{lock.digest}"
    folder.mkdir(parents=True)
    for jar, content in zip(pinned, contents, strict=True):
        (folder / jar.name).write_bytes(content)
    return lock


@pytest.mark.parametrize(("service", "main"), [("kafka", "kafka_2.13"), ("pinot", "pinot-server")])
def test_the_locks_pin_every_jar_once(service: str, main: str) -> None:
    lock = read_lock(service)
    assert len({jar.name for jar in lock.jars}) == len(lock.jars) > 40
    assert all(re.fullmatch(r"[0-9a-f]{64}", jar.sha256) and jar.size > 0 for jar in lock.jars)
    assert {jar.version for jar in lock.jars if jar.artifact == main} == {lock.version}
    pom = (CONF / service / "pom.xml").read_text("utf-8")
    assert lock.version in pom


@pytest.mark.parametrize("service", ["kafka", "pinot"])
def test_ivy_is_asked_for_exactly_the_jars_of_the_lock(service: str) -> None:
    lock = read_lock(service)
    root = ElementTree.fromstring(jars._ivy_module(lock))
    classifier = "{http://ant.apache.org/ivy/maven}classifier"
    asked = [
        (module.get("org"), module.get("name"), module.get("rev"), file.get(classifier))
        for module in root.iter("dependency")
        for file in module.iter("artifact")
    ]
    assert sorted(asked, key=str) == sorted(((jar.group, jar.artifact, jar.version, jar.classifier) for jar in lock.jars), key=str)
    assert all(module.get("transitive") == "false" for module in root.iter("dependency"))


def test_jars_that_are_as_pinned_are_given_in_order(tmp_path: Path) -> None:
    lock = made(tmp_path, b"one", b"two")
    assert [path.read_bytes() for path in ensure_jars(lock, tmp_path, NO_JAVA)] == [b"one", b"two"]


def test_a_jar_with_another_content_of_the_same_size_is_refused(tmp_path: Path) -> None:
    lock = made(tmp_path, b"one", b"two")
    (tmp_path / f"example-{lock.digest}" / lock.jars[1].name).write_bytes(b"tWo")
    with pytest.raises(MachineError, match=r"part1-1\.0\.jar has SHA-256 \w{64}, jars\.lock\.json says .*no jar was used.*delete"):
        ensure_jars(lock, tmp_path, NO_JAVA)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_jar_that_is_missing_or_short_is_resolved_again(tmp_path: Path, damage: str) -> None:
    lock = made(tmp_path, b"one", b"two")
    path = tmp_path / f"example-{lock.digest}" / lock.jars[0].name
    path.unlink() if damage == "missing" else path.write_bytes(b"on")
    with pytest.raises(MachineError, match="could not be resolved"):  # with a Java that does nothing but fail
        ensure_jars(lock, tmp_path, NO_JAVA)
    assert [left.name for left in tmp_path.glob("resolve-*")] == []


def test_what_was_resolved_is_checked_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = made(tmp_path, b"one")
    folder = tmp_path / f"example-{lock.digest}"
    (folder / lock.jars[0].name).unlink()

    def answers_another(_lock: JarLock, work: Path, _java: Path) -> list[Path]:
        jar = work / lock.jars[0].name
        jar.write_bytes(b"eno")
        return [jar]

    monkeypatch.setattr(jars, "_resolve", answers_another)
    with pytest.raises(MachineError, match="does not hold the jar this project pins"):
        ensure_jars(lock, tmp_path, NO_JAVA)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ("exit 0", "not among the 0 jars resolved .*services.launcher.jars example --update"),
        ("echo ':: org.example#part0;1.0: not found' >&2; exit 1", "could not be resolved: org.example#part0;1.0: not found"),
    ],
)
def test_a_resolver_that_brings_nothing_is_told_in_one_line(tmp_path: Path, ends: str, says: str) -> None:
    lock = made(tmp_path, b"one")
    (tmp_path / f"example-{lock.digest}" / lock.jars[0].name).unlink()
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{ends}\n", "utf-8")
    java.chmod(0o755)
    with pytest.raises(MachineError, match=says) as caught:
        ensure_jars(lock, tmp_path, java)
    assert "\n" not in str(caught.value)


def test_another_lock_has_another_folder() -> None:
    lock = read_lock("kafka")
    other = replace(lock, jars=(replace(lock.jars[0], sha256="0" * 64), *lock.jars[1:]))
    assert other.digest != lock.digest


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"service": "x", "version": "1", "jars": [{"group": "g"}]})])
def test_a_broken_lock_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "jars.lock.json"
    path.write_text(text, "utf-8")
    with pytest.raises(MachineError, match=r"jars\.lock\.json cannot be read.*restore it"):
        read_lock("kafka", path)
