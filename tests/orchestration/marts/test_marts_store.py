"""Marts of a lakehouse in a real object store: built on one machine, then built, checked, read and kept on another."""

from __future__ import annotations

import io
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest
from asgi import Client
from store import Bucket, variables

from expectations import validate_hour
from orchestration.console.app import create_app
from orchestration.console.marts import PublishedMarts, export_mart
from orchestration.definitions import build_definitions
from orchestration.ledger import Ledger
from orchestration.marts import MartBuild, build_marts, query_marts
from orchestration.marts.dbt_project import MartsError
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.duck import connect_delta, delta_cursor
from spark_jobs.lake.marts import current_marts
from spark_jobs.lake.tables import BATCH_LEDGER
from spark_jobs.operate.vacuum import vacuum
from tests.orchestration.marts.delta_files import commit
from tests.orchestration.marts.lakes import first_batch, late_batch, ledger_row

pytestmark = pytest.mark.services

NOW = datetime(2026, 3, 12, 8, 0, tzinfo=UTC)
DAYS = "select event_date, campaign_id, impressions, clicks, spend_nanos from fct_campaign_day order by all"
FIRST_DAYS = [(date(2026, 3, 10), "c1", 3, 2, 2500), (date(2026, 3, 10), "c9", 1, 0, 0), (date(2026, 3, 11), "c1", 0, 0, 0)]
LATE_DAYS = [(date(2026, 3, 10), "c1", 3, 3, 3000), *FIRST_DAYS[1:]]


class Machines:
    """Homes of one lakehouse in the store, which is written as a folder and copied there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lake = folder / "lake"
        self.one = Bucket().settings(folder / "one")

    def another(self, name: str) -> Settings:
        return load_settings(home=self.folder / name, lakehouse=self.one.lakehouse_uri)

    def upload(self) -> None:
        Bucket().copy(str(self.lake), self.one.lakehouse_uri)


@pytest.fixture(scope="module")
def built(store: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Machines, MartBuild]:
    """The first build of the first batch, on machine one. The tests run in their order."""
    made = Machines(tmp_path_factory.mktemp("machines"))
    first_batch(made.lake)
    made.upload()
    return made, build_marts(made.one, now=NOW)


def builds_of(settings: Settings) -> dict[str, str]:
    return dict(query_marts(settings, "select distinct mart_group, build_id from mart_build")[1])


def files_with(folder: Path, *texts: str) -> list[str]:
    """The files below a folder that contain one of ``texts``."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return [str(path) for path in found if any(text.encode() in path.read_bytes() for text in texts)]


def test_another_machine_reads_and_shows_the_build(built: tuple[Machines, MartBuild]) -> None:
    machines, build = built
    two = machines.another("two")
    assert query_marts(machines.one, DAYS)[1] == FIRST_DAYS == query_marts(two, DAYS)[1]
    assert set(builds_of(two).values()) == {build.build_id}
    app = create_app(two)
    for page in ("/", "/campaigns", "/trust", "/billing", "/operations"):
        assert Client(app).get(page).status == 200, page
    marts, file = PublishedMarts(two), io.BytesIO()
    with marts.opened() as opened:
        export_mart(opened, "fct_campaign_day", "csv", file)
    marts.close()
    assert file.getvalue().count(build.build_id.encode()) == len(FIRST_DAYS)
    with Ledger.open(two) as ledger:
        assert sum(cell.accepted for cell in ledger.added(-1, 0)) == 11
    with delta_cursor(two.lakehouse_uri) as cursor:
        found = validate_hour(cursor, "events", two.table_uri("events"), None, datetime(2026, 3, 10, 10, tzinfo=UTC))
    assert found.rows == 5


def test_parquet_files_have_the_rows_of_the_marts_and_exact_money(built: tuple[Machines, MartBuild]) -> None:
    machines, build = built
    place = f"{machines.one.state_uri}/marts/{build.build_id}"
    with connect_delta(lakehouse=machines.one.lakehouse_uri) as connection:
        for name, rows in build.rows.items():
            assert connection.execute(f"select count(*) from '{place}/{name}.parquet'").fetchall() == [(rows,)], name
        connection.execute(f"attach '{current_marts(machines.one).path}' as marts (read_only)")
        for name in ("fct_campaign_day", "fct_campaign_minute", "fct_event_accounting", "dim_campaign"):
            differ = f"(from marts.{name} except from '{place}/{name}.parquet')"
            assert connection.execute(f"select count(*) from {differ}").fetchall() == [(0,)], name
        types = {kind for _, kind, *_ in connection.execute(f"describe from '{place}/fct_campaign_day.parquet'").fetchall()}
        assert "DOUBLE" not in types or "DECIMAL(38,0)" in types


def test_vacuum_of_another_machine_keeps_the_versions_of_the_marts(built: tuple[Machines, MartBuild]) -> None:
    machines, build = built
    kept = {each.table: each.kept_versions for each in vacuum(machines.another("three"), dry_run=True).tables}
    assert {name: kept[name] for name in kept if name in build.versions} == {
        name: [version] for name, version in build.versions.items() if name in kept
    }


def test_a_group_is_built_on_another_machine_from_the_published_build(built: tuple[Machines, MartBuild]) -> None:
    machines, first = built
    four = machines.another("four")
    assert current_marts(four).path is not None  # an old copy, which the build must not start from
    second = build_marts(machines.one, "hourly", now=NOW)
    late_batch(machines.lake)
    machines.upload()
    third = build_marts(four, "near_real_time", now=NOW)
    assert third.groups == ("near_real_time",)
    assert builds_of(machines.one) == {"hourly": second.build_id, "near_real_time": third.build_id} == builds_of(four)
    assert query_marts(machines.one, DAYS)[1] == LATE_DAYS
    history = query_marts(four, "select distinct build_id from mart_build_history")[1]
    assert {build for (build,) in history} == {first.build_id, second.build_id, third.build_id}


def test_a_run_leaves_no_credential_and_a_failed_one_says_the_rows(
    built: tuple[Machines, MartBuild], store: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machines, _ = built
    five = machines.another("five")
    secrets = (store["AWS_SECRET_ACCESS_KEY"], store["AWS_ACCESS_KEY_ID"])
    for name, value in variables(five).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        job = build_definitions(five).resolve_job_def("marts_near_real_time")
        assert job.execute_in_process(instance=instance).success
        commit(machines.lake, BATCH_LEDGER, [ledger_row(2, "2026-03-10T10:00", accepted=2, spend_nanos=500)])
        machines.upload()
        assert not job.execute_in_process(instance=instance, raise_on_error=False).success
        with pytest.raises(MartsError) as caught:
            build_marts(five, now=NOW)
    rows: list[dict[str, Any]] = [row for found in caught.value.rows.values() for row in found]
    assert any(row.get("side") == "ledger" and row.get("accepted") == 2 for row in rows), rows
    assert query_marts(five, DAYS)[1] == LATE_DAYS
    assert files_with(five.home_path, *secrets) == []
    assert files_with(tmp_path / "dagster", *secrets) == []
    with duckdb.connect(str(five.marts_path), read_only=True) as marts:
        assert marts.execute("select count(*) from duckdb_secrets()").fetchall() == [(0,)]
