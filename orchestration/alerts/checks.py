"""The health signals as asset checks, which fail (and are red) while their alert is active."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from orchestration.alerts.sensors import PACING_ASSET, PACING_CHECK, SIGNAL_SENSORS, pacing_evaluation, signal_evaluation
from orchestration.marts.pacing import early_spends
from spark_jobs.config import load_settings


def signal_checks() -> dg.AssetChecksDefinition:
    """Return the checks that the sensors evaluate. A person can execute them at any time."""
    watched_signals = [(watched.signal, watched.asset, watched.description) for watched in SIGNAL_SENSORS]
    watched_signals.append((PACING_CHECK, PACING_ASSET, "A campaign spends its budget early."))
    specs = [
        dg.AssetCheckSpec(name, asset=asset, description=f"Fails while this is so: {text} The sensor `alert_{name}` evaluates it.")
        for name, asset, text in watched_signals
    ]

    @dg.multi_asset_check(name="signals", specs=specs, can_subset=True)
    def signals(context: dg.AssetCheckExecutionContext) -> Iterator[Any]:
        """Measure the selected signals."""
        from spark_jobs.operate.health import read_signal

        settings = load_settings()
        for spec in specs:
            if spec.key not in context.selected_asset_check_keys:
                continue
            if spec.name == PACING_CHECK:
                yield pacing_evaluation(settings, early_spends(settings))
            else:
                signal = read_signal(settings, spec.name)
                yield signal_evaluation(settings, spec.asset_key.path[-1], signal, passed=signal.ok)
            yield dg.Output(None, output_name=spec.get_python_identifier())

    return signals
