"""``adtally up`` on a lakehouse in an object store: Dagster's runs work there, and no file or process list shows a credential."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from spark_jobs.config import load_settings
from spark_jobs.operate.status import read_status
from tests.orchestration.up.deployment import Deployment, launch, processes_of, runs
from tests.orchestration.up.test_end_to_end import ENDED, differences, land_in_parts, traffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


def files_with(folder: Path, texts: set[str]) -> list[str]:
    """The files, also those of databases and logs, that have one of some texts."""
    wanted = [text.encode() for text in texts]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if any(text in path.read_bytes() for text in wanted)]


def command_lines(home: Path) -> list[str]:
    """What a list of processes shows of those of a home."""
    found = []
    for process in processes_of(home):
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:  # it has ended
            continue
    return found


def test_runs_work_on_a_store_and_show_no_credential(store: dict[str, str], prefix: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    settings = load_settings(home=home, lakehouse=prefix)
    truth = traffic(tmp_path / "traffic")
    secrets = {store["AWS_ACCESS_KEY_ID"], store["AWS_SECRET_ACCESS_KEY"]}
    with Deployment(home, "--trigger", "1s", ADTALLY_LAKEHOUSE=prefix) as up:
        web = up.wait_until_ready()
        land_in_parts(tmp_path / "traffic", settings, 2, pause_seconds=2)
        offered = sum(row["offered"] for row in truth["accounting"])

        def is_ingested() -> bool:
            return bool(offered == sum(source.offered for source in read_status(settings).sources if source.stream == "events"))

        up.wait_for("all is ingested", is_ingested, seconds=300)
        up.wait_for("hours close", lambda: "closed_hours" in {run["jobName"] for run in runs(web)}, seconds=300)
        launch(web, "marts_near_real_time")
        up.wait_for("all runs end", lambda: {run["status"] for run in runs(web)} <= ENDED, seconds=600)
        assert [run for run in runs(web) if run["status"] != "SUCCESS"] == [], up.report("runs failed")
        shown = command_lines(home)
        assert shown and not any(secret in line for line in shown for secret in secrets)
        assert up.end() == 0, up.report("exit status")
    assert differences(settings, truth) == []
    assert not any(secret in line for line in up.lines for secret in secrets)
    assert files_with(home, secrets) == []
    assert files_with(home, {prefix}), "the location is in files: the search finds what is there"
