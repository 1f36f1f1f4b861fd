"""All that a day needs, through a store that misbehaves at random: exact at the end, and told in lines for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from store import fresh_prefix
from store_faults import Fault, misbehaving
from terminal import environment, run
from truths import assert_truth

from services.simulator import simulate
from spark_jobs.config import load_settings

pytestmark = [pytest.mark.services, pytest.mark.trial]

RATES = {Fault.SLOW_DOWN: 0.02, Fault.SERVER_ERROR: 0.01, Fault.LOST_ANSWER: 0.01, Fault.CUT: 0.01}
COMMANDS = (("ingest",), ("review",), ("attribute",), ("bill",), ("marts", "build"), ("reconcile",), ("status",), ("vacuum",))
_TRIES = 4


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_day_through_a_store_that_misbehaves(store: dict[str, str], tmp_path: Path, seed: int) -> None:
    home = load_settings(home=tmp_path / "home", lakehouse=fresh_prefix())
    truth = json.loads(simulate(home.landing_path, 4_000, seed=seed, lines_per_file=500, click_rate=0.2, conversion=0.4).as_json())
    with misbehaving(store, seed=seed) as faults:
        for fault, share in RATES.items():
            faults.rule(fault, "GET" if fault is Fault.CUT else ".*", share=share)
        variables = {
            **store,
            "AWS_ENDPOINT_URL": faults.endpoint_url,
            "ADTALLY_HOME": str(home.home_path),
            "ADTALLY_LAKEHOUSE": str(home.lakehouse),
            "ADTALLY_MAX_FILES_PER_BATCH": "4",
        }
        failures: list[str] = []
        for command in COMMANDS:
            for tries_left in reversed(range(_TRIES)):
                done = run(*command, cwd=tmp_path, env=environment(**variables), timeout=400)
                assert "Traceback" not in done.err and "<Error>" not in done.err and "\x1b" not in done.err, done.err
                assert store["AWS_SECRET_ACCESS_KEY"] not in done.out + done.err
                told = [line for line in done.err.splitlines() if "failed: " in line]
                assert len(told) == len(set(told)), done.err
                if not done.status:
                    break
                failures.append(f"{' '.join(command)}: {done.err}")
                assert tries_left and "s3://" in done.err, failures
        assert all(faults.injected[fault] for fault in RATES), faults.injected
        print(f"requests {dict(faults.requests)}, injected {dict(faults.injected)}, failed runs {failures}")
    assert_truth(home, truth)
