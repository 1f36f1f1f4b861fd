"""``adtally query`` of Pinot and of named queries: its errors, its list, and what it makes of an answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli.app import run
from services.serving.named import named_queries

CASES = json.loads((Path(__file__).parents[2] / "cases" / "serving" / "refused.json").read_text("utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case["arguments"]) or "nothing")
def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: dict[str, Any]) -> None:
    assert run(["--home", str(tmp_path), "query", "--engine", "pinot", *case["arguments"]]) == 2
    said = capsys.readouterr().err
    assert case["says"] in said and said.count("\n") == 1


def test_a_pinot_that_does_not_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--home", str(tmp_path), "query", "--engine", "pinot", "select 1"]) == 1
    assert capsys.readouterr().err == "adtally: error: Pinot does not run (start it: `adtally services pinot up`)\n"
    # port 1: nobody listens there
    assert run(["--home", str(tmp_path), "query", "--engine", "pinot", "--broker", "http://127.0.0.1:1", "select 1"]) == 1
    assert "http://127.0.0.1:1/query/sql does not answer" in capsys.readouterr().err
    assert run(["--home", str(tmp_path), "query", "--broker", "http://127.0.0.1:1", "select 1"]) == 2
    assert "--broker belongs to --engine pinot" in capsys.readouterr().err


def test_what_only_pinot_knows_is_not_asked_of_the_marts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--home", str(tmp_path), "query", "--named", "freshness"]) == 2
    assert "freshness is not a query of duckdb (--engine pinot)" in capsys.readouterr().err
    assert run(["--home", str(tmp_path), "query", "--named", "totals"]) == 1
    assert "there are no marts yet" in capsys.readouterr().err


def test_the_list_has_every_query_parameter_and_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--list"]) == 0
    said = capsys.readouterr().out
    for query in named_queries():
        assert f"{query.name}  ({', '.join(query.engines)}): {query.meaning}\n" in said
        assert f"columns: {', '.join(query.columns)}" in said


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Iterator[str]:
    """Answers every query with the parameter: answers that a real Pinot gives only when much goes wrong."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps(request.param).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


WHOLE = {"exceptions": [], "numServersQueried": 1, "numServersResponded": 1}
TEN = {"dataSchema": {"columnNames": ["n"], "columnDataTypes": ["LONG"]}, "rows": [[number] for number in range(10)]}


@pytest.mark.parametrize(
    ("broker", "status", "says"),
    [
        (WHOLE | {"numServersResponded": 0}, 1, "not every server answered"),
        (WHOLE | {"numGroupsLimitReached": True}, 1, "more groups than Pinot keeps"),
        (
            WHOLE | {"exceptions": [{"errorCode": 190, "message": "TableDoesNotExistError"}]},
            2,
            "Pinot: TableDoesNotExistError (tables are made by `adtally services pinot up`",
        ),
        (
            WHOLE
            | {
                "exceptions": [
                    {
                        "errorCode": 150,
                        "message": "SQLParsingError:\norg.apache.X: Caught exception while parsing\n\tat a.b(C.java:1)\n"
                        "Caused by: org.apache.SqlException: no such thing\n\t... 9 more",
                    }
                ]
            },
            2,
            "Pinot: no such thing\n",
        ),
        (WHOLE | {"resultTable": TEN}, 0, "Pinot gives 10 rows unless the statement says LIMIT: there may be more\n"),
    ],
    indirect=["broker"],
)
def test_an_answer_that_is_not_whole_is_no_answer(
    broker: str, status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--home", str(tmp_path), "query", "--engine", "pinot", "--broker", broker, "--format", "csv", "select n from t"]
    assert run(asked) == status
    told = capsys.readouterr()
    assert says in told.err and "\tat " not in told.err
    assert told.out == ("n\n" + "".join(f"{number}\n" for number in range(10)) if status == 0 else "")
