"""The local view of a landing folder in a real object store: what it shows, and what it asks the store for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import ConfigurationError, StoreError
from spark_jobs.lake import landing_view, places
from spark_jobs.lake import store as object_store
from spark_jobs.lake.landing_view import fresh_rules_path, impossible_keys, land_folder, landed_object, refresh_landing
from spark_jobs.lake.places import PlacedFile, StorePlace, open_place


@pytest.fixture
def home(prefix: str, tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", landing=f"{prefix}/landing/", rules=f"{prefix}/rules")


def put(home: Settings, *names: str, content: bytes = b"{}\n") -> None:
    for name in names:
        open_place(home.landing_uri).write(name, content)


def shown(home: Settings) -> set[str]:
    """The names of the view, without hidden ones."""
    root = home.landing_path
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")}


def test_an_object_is_a_file_of_its_size_and_time_without_its_bytes(home: Settings) -> None:
    put(home, "events/us/a.jsonl", content=b"x" * 10_000_000)
    put(home, "campaigns/c.csv", content=b"a,b\n")
    refresh_landing(home)
    stand_in = (home.landing_path / "events/us/a.jsonl").stat()
    found = open_place(home.landing_uri).find("events/us/a.jsonl")
    assert found is not None
    assert (stand_in.st_size, stand_in.st_mtime_ns // 10**9) == (10_000_000, int(found.modified.timestamp()))
    assert stand_in.st_blocks * 512 < 100_000
    assert (home.landing_path / "campaigns/c.csv").read_bytes() == b"a,b\n"


def test_new_keys_at_the_end_are_found_at_once_and_others_by_a_whole_listing(home: Settings) -> None:
    put(home, "events/us/b.jsonl", "events/us/d.jsonl", "campaigns/a.csv")
    refresh_landing(home)
    put(home, "events/us/c.jsonl", "events/us/e.jsonl", "events/eu/a.jsonl", "orders/us/a.jsonl", "campaigns/0.csv")
    refresh_landing(home)
    at_once = {"events/us/e.jsonl", "events/eu/a.jsonl", "orders/us/a.jsonl", "campaigns/0.csv"}
    first = {"events/us/b.jsonl", "events/us/d.jsonl", "campaigns/a.csv"}
    assert shown(home) == first | at_once
    refresh_landing(home, is_full=True)
    assert shown(home) == first | at_once | {"events/us/c.jsonl"}
    put(home, "events/us/a.jsonl")
    refresh_landing(home.model_copy(update={"landing_sweep": home.landing_sweep * 0}))
    assert "events/us/a.jsonl" in shown(home)


def test_objects_of_one_second_are_numbered_in_the_order_of_their_keys(home: Settings) -> None:
    view = landing_view._View(home.landing_uri, home.landing_path)
    at = datetime(2026, 1, 1, tzinfo=UTC)

    def times(*names: str) -> list[int]:
        view._make_all([PlacedFile(name, 3, at, name) for name in names])
        return [(home.landing_path / name).stat().st_mtime_ns // 10**6 - int(at.timestamp()) * 1000 for name in names]

    assert times("events/us/b", "events/eu/z", "events/us/a", "orders/us/a") == [2, 0, 1, 0]
    assert times("events/us/b", "events/eu/z", "events/us/0") == [2, 0, 3], "what was found later comes later"
    many = [f"events/us/c{number:04d}" for number in range(1_200)]
    assert times(*many) == [*range(4, 1_000), *[999] * 204]


def test_overwritten_and_deleted_objects_are_seen_by_a_whole_listing(home: Settings) -> None:
    put(home, "events/us/a.jsonl", "events/us/b.jsonl", "events/us/x/y")
    put(home, "campaigns/a.csv", content=b"old\n")
    refresh_landing(home)
    before = (home.landing_path / "events/us/a.jsonl").stat().st_mtime_ns
    put(home, "events/us/a.jsonl", content=b"[]\n")
    put(home, "campaigns/a.csv", content=b"new\n")  # as long, and in the same second
    refresh_landing(home)
    assert (home.landing_path / "campaigns/a.csv").read_bytes() == b"new\n"
    open_place(home.landing_uri).delete(["events/us/b.jsonl", "events/us/x/y", "campaigns/a.csv"])
    put(home, "events/us/x")  # what was a folder is an object now
    refresh_landing(home, is_full=True)
    assert shown(home) == {"events/us/a.jsonl", "events/us/x"}
    assert (home.landing_path / "events/us/a.jsonl").stat().st_mtime_ns != before


def test_thousands_of_objects_are_not_listed_again(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"events/us/{number:05d}.jsonl" for number in range(3_000)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: put(home, name), names))
    refresh_landing(home)
    assert shown(home) == set(names)
    listed: list[str] = []
    inner = StorePlace.list

    def counting(self: StorePlace, folder: str = "", *, after: str | None = None) -> Iterator[PlacedFile]:
        for found in inner(self, folder, after=after):
            listed.append(found.name)
            yield found

    monkeypatch.setattr(StorePlace, "list", counting)
    put(home, "events/us/03000.jsonl")
    refresh_landing(home)
    assert listed == ["events/us/03000.jsonl"]
    assert len(shown(home)) == 3_001
    refresh_landing(home, is_full=True)
    assert len(listed) == 1 + 3_001


@pytest.mark.parametrize(
    ("keys", "wanted", "impossible"),
    [
        (["events/us/a.jsonl"], ["events/us/a.jsonl"], []),
        (["a//b", "a/../b", "./a", "x/"], [], ["./a", "a/../b", "a//b", "x/"]),
        (["events/us/" + "n" * 256, "events/us/" + "n" * 255], ["events/us/" + "n" * 255], ["events/us/" + "n" * 256]),
        (["events/us/a.jsonl", "events/us/a.jsonl/b"], ["events/us/a.jsonl"], ["events/us/a.jsonl/b"]),
        (["events/us", "events/us/a.jsonl"], ["events/us/a.jsonl"], ["events/us"]),
        (["other", "other/a", "other/a/b"], ["other/a/b"], ["other", "other/a"]),
        (["events/us/_a.jsonl", "events/.us/a.jsonl", "_adtally/x"], [], []),
        (["events/us/a\0.jsonl"], [], ["events/us/a\0.jsonl"]),
    ],
)
def test_keys_that_cannot_be_paths_are_sorted_out(keys: list[str], wanted: list[str], impossible: list[str]) -> None:
    found = landing_view._usable(PlacedFile(key, 1, datetime(2026, 1, 1, tzinfo=UTC), "") for key in keys)
    assert (sorted(found[0]), found[1]) == (wanted, impossible)


def test_empty_objects_that_mark_folders_are_skipped() -> None:
    sizes = {"events": 0, "events/us": 0, "events/us/a.jsonl": 0, "campaigns/": 0}
    found = landing_view._usable(PlacedFile(name, size, datetime(2026, 1, 1, tzinfo=UTC), "") for name, size in sizes.items())
    assert (sorted(found[0]), found[1]) == (["events/us/a.jsonl"], [])


class _Listing(BaseHTTPRequestHandler):
    """A bucket with keys that SeaweedFS does not take; it can only be listed."""

    keys: tuple[str, ...] = ()

    def do_GET(self) -> None:
        one = "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag><Size>3</Size></Contents>"
        contents = "".join(one.format(escape(key)) for key in self.keys)
        head = "<Name>b</Name><Prefix></Prefix><IsTruncated>false</IsTruncated>"
        body = f'<?xml version="1.0"?><ListBucketResult>{head}{contents}</ListBucketResult>'.encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def test_a_key_that_obstore_refuses_hides_no_other(store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Listing, "keys", ("l/events/us//a.jsonl", "l/events/us/../b.jsonl", "l/events/us/c.jsonl"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Listing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    home = load_settings(home=tmp_path / "home", landing="s3://b/l")
    try:
        refresh_landing(home)
    finally:
        server.shutdown()
        server.server_close()
    assert shown(home) == {"events/us/c.jsonl"}
    assert impossible_keys(home.landing_path) == ["events/us/../b.jsonl", "events/us//a.jsonl"]


def test_an_object_is_read_from_where_the_reader_is(home: Settings) -> None:
    data = bytes(range(256)) * 20_000
    put(home, "events/us/a.jsonl", content=data)
    stored = landed_object(f"{home.landing_uri}/events/us/a.jsonl")
    assert stored is not None
    with stored.open() as handle:
        assert handle.read(10) == data[:10]
        assert handle.seek(5_000_001) == 5_000_001
        assert handle.read(100) == data[5_000_001:5_000_101]
        assert (handle.seek(0), handle.read(), handle.read()) == (0, data, b"")
        assert handle.seek(-3, 2) == len(data) - 3
        assert handle.read() == data[-3:]
    with stored.open() as handle:
        assert handle.seek(-3, 2) == len(data) - 3
    put(home, "events/us/empty.jsonl", content=b"")
    with StorePlace(home.landing_uri).open("events/us/empty.jsonl") as handle:
        assert handle.read() == b""
    with StorePlace(home.landing_uri).open("events/us/gone.jsonl") as handle, pytest.raises(FileNotFoundError):
        handle.read()


def test_rules_are_copied_and_renewed(home: Settings, tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "a.toml").write_text("x = 1\n")
    (tmp_path / "rules" / "list.txt").write_text("u-1\n")
    land_folder(tmp_path / "rules", home.rules_uri)
    assert {path.name for path in fresh_rules_path(home).glob("[!.]*")} == {"a.toml", "list.txt"}
    open_place(home.rules_uri).write("a.toml", b"x = 2\n")
    open_place(home.rules_uri).delete(["list.txt"])
    assert {path.name: path.read_text() for path in fresh_rules_path(home).glob("[!.]*")} == {"a.toml": "x = 2\n"}


def test_a_folder_that_is_no_folder_of_rules_is_refused(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing_view, "_MOST_RULE_FILES", 1)
    for name in ("a", "b"):
        open_place(home.rules_uri).write(name, b"")
    with pytest.raises(ConfigurationError, match="too many objects"):
        fresh_rules_path(home)


def test_a_store_that_does_not_answer_is_told_with_the_operation(
    store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 0.2)
    home = load_settings(home=tmp_path / "home", landing="s3://away/landing")
    with pytest.raises(StoreError, match="list s3://away/landing"):
        refresh_landing(home)
    stored = landed_object("s3://away/landing/events/us/a.jsonl")
    assert stored is not None
    with pytest.raises(StoreError, match=r"get s3://away/landing/events/us/a\.jsonl"):
        stored.open().read()


def test_a_local_folder_has_no_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "obstore", None)
    home = load_settings(home=tmp_path)
    refresh_landing(home, is_full=True)
    assert (home.landing_path, fresh_rules_path(home), list(tmp_path.iterdir())) == (tmp_path / "landing", tmp_path / "rules", [])
