"""The data docs: a page a validation, an index of the last ones, several writers."""

from __future__ import annotations

import re
import threading
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import duckdb
import pytest
from filelock import FileLock

from expectations import docs as docs_module
from expectations.docs import DataDocs, Entry
from expectations.engine import DuckDBValidator
from expectations.errors import DocsBusyError
from expectations.suites.common import unique
from tests.expectations.small_lake import HOUR, NEXT_HOUR, Lake, validated

ENTRY = Entry("", "events", "2025-06-02T10Z", 3, "by hand", 10, 1, 0, 0, "2025-06-02T12:00:00Z")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake(tmp_path_factory.mktemp("lake"))
    lake.sql(["update events set event_type = '<b>view</b>' where event_id = 'e-7'"])
    lake.write()
    return lake


def result() -> Any:
    with duckdb.connect() as connection:
        connection.execute("create temp table events as select 'e-' || n as event_id from range(3) as numbers(n)")
        with closing(DuckDBValidator(connection)) as validator:
            return validator.validate("events", [unique("event_id")], ["event_id"], {})


class Links(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.found += [value or "" for name, value in attrs if name in ("href", "src") and not (value or "").startswith("#")]


def test_a_validation_has_a_page_that_says_what_failed_and_loads_nothing(made: Lake, tmp_path: Path) -> None:
    bad = validated("events", made.uri("events"), None, HOUR, related=made.related(), docs=tmp_path, run_name="run-1")
    good = validated("events", made.uri("events"), None, NEXT_HOUR, related=made.related(), docs=tmp_path)
    assert bad.page is not None and good.page is not None
    text = bad.page.read_text("utf-8")
    assert "1 of severity error not met" in text
    assert "event_type is impression or click" in text
    assert "&lt;b&gt;view&lt;/b&gt;" in text and "<b>view" not in text
    assert "all met" in good.page.read_text("utf-8")
    for page in (bad.page, good.page, DataDocs(tmp_path).index):
        assert not re.search(r"https?://", page.read_text("utf-8"))
        assert all((page.parent / link).exists() for link in Links(page).found)
    listed = DataDocs(tmp_path).entries()
    assert [(entry.hour, entry.errors, entry.run_name) for entry in listed] == [
        ("2025-06-02T11Z", 0, "by hand"),
        ("2025-06-02T10Z", 1, "run-1"),
    ]
    assert Links(DataDocs(tmp_path).index).found == [entry.page for entry in listed]


def test_the_last_validations_are_kept(tmp_path: Path) -> None:
    docs = DataDocs(tmp_path)
    pages = [docs.add(replace(ENTRY, run_name=f"run-{n}"), result(), {}, keep=2) for n in range(4)]
    assert [page.exists() for page in pages] == [False, False, True, True]
    assert [entry.run_name for entry in docs.entries()] == ["run-3", "run-2"]


def test_a_list_that_cannot_be_read_begins_anew(tmp_path: Path) -> None:
    docs = DataDocs(tmp_path)
    docs.add(ENTRY, result(), {})
    (tmp_path / "validations.json").write_text("[{]")
    page = docs.add(ENTRY, result(), {})
    assert [tmp_path / entry.page for entry in docs.entries()] == [page]


def test_several_may_add_at_once(tmp_path: Path) -> None:
    found = result()
    threads = [threading.Thread(target=lambda: DataDocs(tmp_path).add(ENTRY, found, {})) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(DataDocs(tmp_path).entries()) == 4
    assert not list(tmp_path.rglob(".*.html.*"))


def test_a_writer_that_never_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_module, "_PATIENCE_SECONDS", 0.1)
    with FileLock(tmp_path / ".docs.lock"), pytest.raises(DocsBusyError, match="being written by somebody else"):
        DataDocs(tmp_path).add(ENTRY, result(), {})
    assert DataDocs(tmp_path).entries() == []
