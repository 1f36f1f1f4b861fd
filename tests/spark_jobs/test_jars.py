"""The jars: what the lock pins, and that nothing else is ever loaded. No test here resolves anything from a network."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyspark
import pytest

from spark_jobs import jars
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import MachineError
from spark_jobs.jars import COORDINATES, LOCK_FILE, JarLock, LockedJar, ensure_jars, jars_are_cached, read_lock
from spark_jobs.java import Java

CONTENTS = {"org.a_one-1.0.jar": b"one" * 1000, "org.b_two-2.0.jar": b"two" * 2000}
LOCK = JarLock(
    spark_version=version("pyspark"),
    coordinates=("org.a:one:1.0",),
    jars=tuple(LockedJar(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENTS.items()),
    excluded={"org.c:three": "three.jar"},
)


class Repository:
    """Stands in for Spark's resolver: gives out ``contents`` and counts how often it was asked."""

    def __init__(self) -> None:
        self.contents = dict(CONTENTS)
        self.asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        self.seconds = 0.0

    def resolve(self, coordinates: tuple[str, ...], excludes: tuple[str, ...], work: Path) -> list[Path]:
        self.asked.append((coordinates, excludes))
        time.sleep(self.seconds)
        folder = work / "ivy" / "jars"
        folder.mkdir(parents=True)
        for name, data in self.contents.items():
            (folder / name).write_bytes(data)
        return sorted(folder.glob("*.jar"))


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Repository:
    made = Repository()
    monkeypatch.setattr(jars, "_resolve", made.resolve)
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with a cache of their own, in which nothing is."""
    return load_settings(home=tmp_path / "home", cache_dir=tmp_path / "cache")


def folder_of(settings: Settings) -> Path:
    return settings.jar_cache_path / LOCK.digest


def cached(settings: Settings) -> dict[str, bytes]:
    """What lies in the cache."""
    return {path.name: path.read_bytes() for path in folder_of(settings).iterdir()}


def refused(settings: Settings, *parts: str) -> str:
    with pytest.raises(MachineError) as caught:
        ensure_jars(settings, lock=LOCK)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# The lock of the project


def test_the_lock_is_complete() -> None:
    entries = json.loads(LOCK_FILE.read_text("utf-8"))["jars"]
    assert entries
    for entry in entries:
        assert set(entry) == {"name", "size", "sha256"}
        assert re.fullmatch(r"[\w.-]+_[\w.-]+-\d+(\.\d+)+[\w.-]*\.jar", entry["name"]), f"{entry['name']}: no version"
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), entry["name"]
        assert entry["size"] > 0
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)


def test_the_lock_belongs_to_what_the_project_asks_for() -> None:
    lock = read_lock()
    assert lock.coordinates == COORDINATES
    names = {jar.name for jar in lock.jars}
    for coordinate in COORDINATES:
        group, artifact, number = coordinate.split(":")
        assert f"{group}_{artifact}-{number}.jar" in names
        assert number == version({"io.delta": "delta-spark", "org.apache.spark": "pyspark"}[group])
    for left_out in lock.excluded:
        assert not [name for name in names if name.startswith(left_out.replace(":", "_") + "-")], left_out


def test_what_the_lock_leaves_out_is_in_spark() -> None:
    shipped = Path(pyspark.__file__).parent / "jars"
    for owner in read_lock().excluded.values():
        assert (shipped / owner).is_file(), owner


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(spark_version="3.5.0"),
        lambda data: data.pop("jars"),
        lambda data: data["jars"][0].pop("sha256"),
        lambda data: data["jars"][0].update(url="x"),
    ],
)
def test_a_wrong_lock_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(LOCK_FILE.read_text("utf-8"))
    change(data)
    path = tmp_path / "jars.lock.json"
    path.write_text(json.dumps(data))
    with pytest.raises(MachineError, match=r"jars\.lock\.json"):
        read_lock(path)


def test_no_lock_or_half_a_lock(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="restore it from the repository"):
        read_lock(tmp_path / "gone.json")
    half = tmp_path / "half.json"
    half.write_text(LOCK_FILE.read_text("utf-8")[:300])
    with pytest.raises(MachineError, match="restore it from the repository"):
        read_lock(half)


# The cache


def test_jars_are_resolved_once(settings: Settings, repository: Repository) -> None:
    said: list[str] = []
    assert not jars_are_cached(settings, LOCK)
    paths = ensure_jars(settings, said.append, lock=LOCK)
    assert [path.name for path in paths] == [jar.name for jar in LOCK.jars]
    assert cached(settings) == CONTENTS
    assert repository.asked == [(LOCK.coordinates, tuple(LOCK.excluded))]
    assert len(said) == 2 and str(folder_of(settings)) in said[0]
    assert jars_are_cached(settings, LOCK)
    # nothing but the jars and the lock is left
    assert {path.name for path in settings.jar_cache_path.iterdir()} <= {LOCK.digest, f"{LOCK.digest}.lock"}


def test_cached_jars_need_no_network_and_no_process(
    settings: Settings, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_jars(settings, lock=LOCK)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the cache was complete")

    monkeypatch.setattr(jars, "_resolve", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    monkeypatch.setattr(socket, "socket", never)
    said: list[str] = []
    assert ensure_jars(settings, said.append, lock=LOCK) == first
    assert said == []


def test_what_else_was_resolved_is_not_loaded(settings: Settings, repository: Repository) -> None:
    repository.contents["org.d_stranger-1.0.jar"] = b"stranger"
    ensure_jars(settings, lock=LOCK)
    assert cached(settings) == CONTENTS


@pytest.mark.parametrize("name", list(CONTENTS))
def test_a_resolved_jar_with_another_sha256_is_refused(settings: Settings, repository: Repository, name: str) -> None:
    wrong = b"x" + CONTENTS[name][1:]
    repository.contents[name] = wrong
    pinned = next(jar.sha256 for jar in LOCK.jars if jar.name == name)
    refused(settings, name, hashlib.sha256(wrong).hexdigest(), pinned, "no jar was used", "does not hold the jar")
    assert not folder_of(settings).exists()
    assert not list(settings.jar_cache_path.glob("resolve-*"))
    # as soon as the repository is right, all is well
    repository.contents = dict(CONTENTS)
    ensure_jars(settings, lock=LOCK)
    assert cached(settings) == CONTENTS


def test_a_resolved_jar_of_another_size_is_refused(settings: Settings, repository: Repository) -> None:
    repository.contents["org.a_one-1.0.jar"] += b"more"
    refused(settings, "org.a_one-1.0.jar", "3004 bytes", "3000", "no jar was used")
    assert not folder_of(settings).exists()


def test_a_jar_that_was_not_resolved_is_named(settings: Settings, repository: Repository) -> None:
    del repository.contents["org.b_two-2.0.jar"]
    refused(settings, "org.b_two-2.0.jar", "not among the 1 jars resolved", "--update")


def test_a_changed_jar_in_the_cache_is_refused(settings: Settings, repository: Repository) -> None:
    path = ensure_jars(settings, lock=LOCK)[1]
    path.write_bytes(b"x" + path.read_bytes()[1:])
    refused(settings, str(path), "SHA-256", "no jar was used", f"delete {folder_of(settings)} and run again")
    assert len(repository.asked) == 1  # not put right behind the reader's back


@pytest.mark.parametrize("damage", ["gone", "empty", "short", "no folder", "a folder"])
def test_a_half_written_cache_is_repaired(settings: Settings, repository: Repository, damage: str) -> None:
    path = ensure_jars(settings, lock=LOCK)[0]
    if damage == "gone":
        path.unlink()
    elif damage == "no folder":
        for other in folder_of(settings).iterdir():
            other.unlink()
        folder_of(settings).rmdir()
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 100])
    assert not jars_are_cached(settings, LOCK)
    ensure_jars(settings, lock=LOCK)
    assert cached(settings) == CONTENTS
    assert len(repository.asked) == 2


def test_what_a_killed_resolver_left_is_removed(settings: Settings, repository: Repository) -> None:
    left = settings.jar_cache_path / f"resolve-{LOCK.digest}-dead" / "ivy" / "jars"
    of_another = settings.jar_cache_path / "resolve-0123456789abcdef-alive"
    left.mkdir(parents=True)
    of_another.mkdir()
    (left / "org.a_one-1.0.jar.part").write_bytes(b"half")
    ensure_jars(settings, lock=LOCK)
    assert cached(settings) == CONTENTS
    assert [path.name for path in settings.jar_cache_path.glob("resolve-*")] == [of_another.name]


def test_of_two_at_once_one_resolves(settings: Settings, repository: Repository) -> None:
    repository.seconds = 0.3
    found: list[list[Path]] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_jars(settings, lock=LOCK))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert len(repository.asked) == 1


def test_another_lock_has_another_folder(settings: Settings, repository: Repository) -> None:
    ensure_jars(settings, lock=LOCK)
    other = JarLock(LOCK.spark_version, LOCK.coordinates, LOCK.jars[:1], LOCK.excluded)
    assert not jars_are_cached(settings, other)
    assert ensure_jars(settings, lock=other)[0].parent != folder_of(settings)


def test_a_cache_that_cannot_be_written(settings: Settings, repository: Repository) -> None:
    settings.jar_cache_path.parent.mkdir()
    settings.jar_cache_path.write_text("a file")
    refused(settings, str(settings.jar_cache_path), "set ADTALLY_CACHE_DIR")


# The resolver


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the resolver's process is started with, and how it ends."""
    seen: dict[str, Any] = {"ends": subprocess.CompletedProcess([], 0, "", "")}

    def run(command: list[str], **options: Any) -> Any:
        seen.update(command=command, **options)
        if isinstance(seen["ends"], Exception):
            raise seen["ends"]
        return seen["ends"]

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(jars, "require_java", lambda: Java(Path("java"), 17))
    return seen


def test_the_resolver_is_asked_for_what_is_pinned(
    settings: Settings, resolver: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARK_HOME", "/of/another/spark")
    refused(settings, "not among the 0 jars resolved")
    assert {",".join(LOCK.coordinates), ",".join(LOCK.excluded)} <= set(resolver["command"])
    assert "SPARK_HOME" not in resolver["env"]
    assert resolver["timeout"] > 0


def test_a_resolver_that_fails_is_told_in_one_line(settings: Settings, resolver: dict[str, Any]) -> None:
    stderr = ":: problems summary ::\n\t:: unresolved dependency: io.delta#delta;4.4.0: not found\n" + "\tat java.Frame\n" * 50
    resolver["ends"] = subprocess.CompletedProcess([], 1, "", stderr)
    message = refused(settings, "unresolved dependency: io.delta#delta;4.4.0: not found", "Maven Central")
    assert "Frame" not in message


def test_a_resolver_that_hangs_is_given_up(settings: Settings, resolver: dict[str, Any]) -> None:
    resolver["ends"] = subprocess.TimeoutExpired("python", 900)
    refused(settings, "within 900 seconds", "check the network")


def test_without_java_nothing_is_resolved(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_java() -> None:
        raise MachineError("Java is not installed")

    monkeypatch.setattr(jars, "require_java", no_java)
    refused(settings, "Java is not installed")


# The command


def test_the_command_prints_paths_and_refuses_on_one_line(
    settings: Settings, repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jars, "read_lock", lambda: LOCK)
    monkeypatch.setattr(jars, "load_settings", lambda: settings)
    assert jars.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder_of(settings) / name) for name in CONTENTS]
    (folder_of(settings) / "org.a_one-1.0.jar").write_bytes(b"x" * 3000)
    assert jars.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("adtally: error: ") and err.count("\n") == 1


def test_an_update_leaves_to_spark_what_spark_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def resolve(_coordinates: tuple[str, ...], excludes: tuple[str, ...], work: Path) -> list[Path]:
        asked.append(excludes)
        made = []
        for name, classes in {
            "org.a_one_2.13-1.0.jar": ["a/One.class", "a/Two.class"],
            "org.b_two-lines-2.0.1.jar": ["b/One.class", "b/Two.class", "b/Three.class"],
        }.items():
            if jars._group_and_artifact(name) in excludes:
                continue
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "w") as archive:
                for entry in (*classes, "META-INF/versions/9/module-info.class", "reference.conf"):
                    archive.writestr(entry, b"")
            made.append(path)
        return made

    monkeypatch.setattr(jars, "_resolve", resolve)
    # one class in common is a coincidence, two of three are the same library
    monkeypatch.setattr(
        jars, "_classes_of_spark", lambda: {"a/One.class": "x.jar", "b/One.class": "two-1.9.jar", "b/Two.class": "two-1.9.jar"}
    )
    path = tmp_path / "jars.lock.json"
    written = jars.update_lock(path, progress=lambda _line: None)
    assert asked == [(), ("org.b:two-lines",)]
    assert written.excluded == {"org.b:two-lines": "two-1.9.jar"}
    assert [jar.name for jar in written.jars] == ["org.a_one_2.13-1.0.jar"]
    assert read_lock(path) == written
