"""Whole files of a folder and of an object store: the same calls do the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store import EVERYWHERE, Location

from spark_jobs.errors import ConfigurationError
from spark_jobs.lake.places import Place, StorePlace, open_place


@pytest.fixture
def files(place: Location, tmp_path: Path) -> Place:
    """An empty place."""
    return open_place(f"{place.settings(tmp_path).lakehouse_uri}/files")


@EVERYWHERE
def test_files_are_written_listed_read_and_deleted(files: Place, tmp_path: Path) -> None:
    assert list(files.list()) == []
    assert files.find("a/1") is None
    with pytest.raises(FileNotFoundError):
        files.read("a/1")
    with pytest.raises(FileNotFoundError):
        files.download("a/1", tmp_path / "none")
    for name, content in (("b/2", b"two"), ("a/1", b"one"), ("a/sub/3", b"three")):
        files.write(name, content)
    files.write("a/1", b"ONE!")
    assert [(found.name, found.size) for found in files.list()] == [("a/1", 4), ("a/sub/3", 5), ("b/2", 3)]
    assert [found.name for found in files.list("a")] == ["a/1", "a/sub/3"]
    assert [found.name for found in files.list("a", after="a/1")] == ["a/sub/3"]
    assert files.below("a").read("1") == b"ONE!"
    files.download("a/sub/3", tmp_path / "copy")
    files.upload(tmp_path / "copy", "c/4")
    with files.open("c/4") as opened:
        opened.seek(2)
        assert (opened.read(2), opened.read()) == (b"re", b"e")
    files.delete(["b/2", "b/2", "never"])
    files.delete_folder("a")
    assert [found.name for found in files.list()] == ["c/4"]


def test_one_of_many_creates_an_object_and_one_swaps_it(prefix: str) -> None:
    place = open_place(prefix)
    assert isinstance(place, StorePlace)

    def create(writer: int) -> bool:
        try:
            place.create("lease", str(writer).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(create, range(16))) == 1
        content, tag = place.read_tagged("lease")
        assert content.decode() in {str(writer) for writer in range(16)}
        tags = pool.map(lambda writer: place.swap("lease", f"new {writer}".encode(), tag), range(16))
        swapped = [new for new in tags if new is not None]
    assert len(swapped) == 1
    assert place.read_tagged("lease")[1] == swapped[0]
    assert place.swap("none", b"", tag) is None


def test_without_credentials_a_store_is_refused_in_one_line(without_credentials: None) -> None:
    with pytest.raises(ConfigurationError, match="there are no credentials for s3://"):
        open_place("s3://lake/x").read("any")
