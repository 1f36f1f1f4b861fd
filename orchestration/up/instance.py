"""The Dagster instance of an installation: its storage and configuration under ADTALLY_HOME/dagster."""

from __future__ import annotations

import contextlib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import MachineError

if TYPE_CHECKING:
    from dagster import DagsterInstance

POOLS = ("attribution", "billing", "compaction", "corrections", "marts", "quality", "spark")
"""The pools of the definitions. Each runs one run at a time."""

_NO_LOGS = {"compute_logs": {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}}
_RELOAD_NAME = ".reload"
_SHARED_STORAGE = """
# Follows ADTALLY_DAGSTER_STORAGE, which has the address: `adtally` adds and removes these lines.
storage:
  postgres:
    postgres_url:
      env: ADTALLY_DAGSTER_STORAGE
"""


def write_instance_config(settings: Settings) -> Path:
    """Write ADTALLY_HOME/dagster/dagster.yaml unless it exists; return its path.

    It does not name the storage (SQLite) and the compute logs: these are beside it, so that a home can be moved. Only a storage
    that machines share is named, by the variable that has its address. Raises MachineError if its package is missing.
    """
    if settings.dagster_storage is not None and find_spec("dagster_postgres") is None:
        raise MachineError(
            "ADTALLY_DAGSTER_STORAGE is set, and dagster-postgres is not installed", hint="pip install 'adtally[postgres]'"
        )
    path = settings.dagster_path / "dagster.yaml"
    present = path.read_text("utf-8") if path.exists() else None
    wanted = (files("orchestration.up") / path.name).read_text("utf-8") if present is None else present
    wanted = wanted.replace(_SHARED_STORAGE, "") + (_SHARED_STORAGE if settings.dagster_storage is not None else "")
    if wanted != present:
        disk.write_file(path, wanted.encode())
    return path


def initialize_pool_limits(instance: DagsterInstance) -> None:
    """Set the limit of each pool before Dagster's queue runs.

    The queue reads the known pools before it adds new ones. So, when it first sees a pool, it applies no limit and starts all
    runs that wait for it.
    """
    storage, default = instance.event_log_storage, instance.global_op_concurrency_default_limit
    known = {limit.name: limit for limit in storage.get_pool_limits()}
    for pool in POOLS:
        if pool not in known:
            storage.initialize_concurrency_limit_to_default(pool)
        elif default is not None and known[pool].from_default and known[pool].limit != default:
            storage.set_concurrency_slots(pool, default)  # with Postgres, Dagster cannot initialize a known pool again


def home_instance(settings: Settings, *, captures_output: bool = True) -> DagsterInstance:
    """Return the instance of this home, which is created if missing. Use it as a context, or dispose of it.

    With ``captures_output``, Dagster redirects this process's output to files while a step runs. A process that shows progress in
    a terminal runs steps without it.
    """
    from dagster import DagsterInstance
    from dagster._core.instance.ref import InstanceRef

    folder = str(write_instance_config(settings).parent)
    return DagsterInstance.from_ref(InstanceRef.from_dir(folder, overrides=None if captures_output else _NO_LOGS))


def request_reload(settings: Settings) -> None:
    """Ask an ``adtally up`` on this home to load the definitions again. If none runs, the next one loads them anyway."""
    with contextlib.suppress(OSError):
        (settings.dagster_path / _RELOAD_NAME).touch()


def take_reload_request(settings: Settings) -> bool:
    """Return whether a reload was requested since the last call."""
    request = settings.dagster_path / _RELOAD_NAME
    if not request.exists():
        return False
    request.unlink(missing_ok=True)
    return True


if __name__ == "__main__":  # where Dagster's processes are not started by `adtally up`: deploy/kubernetes
    from dagster import DagsterInstance

    with DagsterInstance.get() as prepared:
        initialize_pool_limits(prepared)
