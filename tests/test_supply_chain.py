"""The bill of materials and the audit: what they leave out, they must say."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import audit
import pytest
import sbom


@pytest.fixture(scope="module")
def whole() -> list[sbom.Component]:
    return sbom.components()


def test_the_bill_has_all_that_is_installed_and_pinned(whole: list[sbom.Component]) -> None:
    assert sbom.problems(json.dumps(sbom.bill(whole))) == []
    assert sbom.bill(whole) == sbom.bill(list(whole))  # it says the same again
    assert {one.used_by for one in whole} == {"console", "python", "ingest", "kafka", "pinot", "spark"}


def test_what_a_bill_leaves_out_is_named(whole: list[sbom.Component]) -> None:
    def without(name: str) -> list[str]:
        return sbom.problems(json.dumps(sbom.bill([one for one in whole if one.name != name])))

    assert [line.split(" is not")[0].rsplit(" ", 1)[0] for line in without("duckdb")] == ["the installed package duckdb"]
    assert any("delta-storage" in line and "jars.lock.json" in line for line in without("delta-storage"))
    assert any(line.startswith("Spark's rocksdbjni-") for line in without("rocksdbjni"))
    assert "the console's htmx.min.js is not in it as it is" in without("htmx.org")
    nameless = sbom.Component("", "a", "1", "spark", (("a-1.jar", "0" * 64),))
    assert "spark::a@1 has no group: no advisory can be found for it" in sbom.problems(json.dumps(sbom.bill([*whole, nameless])))
    twin = sbom.Component(whole[0].group, whole[0].name, whole[0].version, whole[0].used_by, (("b.jar", "0" * 64),))
    assert any("is in it twice" in line for line in sbom.problems(json.dumps(sbom.bill([*whole, twin]))))
    assert "not CycloneDX" in sbom.problems(json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [{}]}))[0]


FOUND = [
    sbom.Component(None, "jinja2", "2.4", "python", ()),
    sbom.Component("org.apache.logging.log4j", "log4j-core", "2.14.1", "spark", ()),
]


def test_a_component_names_its_registry() -> None:
    browser_code = next(one for one in sbom.browser_packages() if one.name == "htmx.org")
    assert browser_code.purl == f"pkg:npm/htmx.org@{browser_code.version}"
    assert [query["package"] for query in audit.queries([*FOUND, browser_code])] == [
        {"ecosystem": "PyPI", "name": "jinja2"},
        {"ecosystem": "Maven", "name": "org.apache.logging.log4j:log4j-core"},
        {"ecosystem": "npm", "name": "htmx.org"},
    ]


@pytest.fixture
def osv(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[Any]]]:
    """Answers with the parameter: a list of results, or a status."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"])
            body = json.dumps({"results": request.param}).encode() if isinstance(request.param, list) else b"no"
            self.send_response(200 if isinstance(request.param, list) else request.param)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("osv", "status", "says"),
    [
        ([{}, {}], 0, "2 packages and jars, 0 with advisories"),
        ([{}, {"vulns": [{"id": "GHSA-jfh8"}]}], 1, "Maven org.apache.logging.log4j:log4j-core 2.14.1: GHSA-jfh8"),
        ([{}], 2, "answers 1 of 2 queries; nothing was audited"),
        (503, 2, "no advisory source can be reached"),
        (200, 2, "no advisory source can be reached"),
    ],
    indirect=["osv"],
)
def test_an_audit_says_what_it_knows(
    osv: tuple[str, list[Any]], status: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "components", lambda: FOUND)
    address, asked = osv
    assert audit.main(["--url", address]) == status
    told = capsys.readouterr()
    assert says in told.out + told.err
    assert asked == audit.queries(FOUND)


def test_an_audit_without_a_network_or_of_the_nameless_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "components", lambda: FOUND)
    assert audit.main(["--url", "http://127.0.0.1:1/"]) == 2
    assert "nothing was audited" in capsys.readouterr().err
    monkeypatch.setattr(audit, "components", lambda: [sbom.Component("", "a", "1", "spark", ())])
    assert audit.main(["--list"]) == 2
    assert "no group" in capsys.readouterr().err
