"""The files of deploy/: what they name exists, and Dagster loads its part of them, with a real Postgres."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import terminal
import yaml
from dagster import DagsterInstance, DagsterRun
from dagster._core.instance.ref import InstanceRef
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin
from dagster._core.workspace.load_target import WorkspaceFileTarget
from postgres import Postgres, throwaway_postgres

from orchestration.up.instance import POOLS
from orchestration.up.services import LOCATION
from spark_jobs.config import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
PODS = ("Deployment", "StatefulSet", "Job")
ENVIRONMENT = DEPLOY / "machines" / "adtally.env.example"


def documents() -> list[dict[str, Any]]:
    """Return every object of Kubernetes' files."""
    return [found for path in sorted(KUBERNETES.glob("*.yaml")) for found in yaml.safe_load_all(path.read_text("utf-8"))]


def of_kind(*kinds: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in documents() if found["kind"] in kinds}


def pods() -> dict[str, dict[str, Any]]:
    return {name: found["spec"]["template"] for name, found in of_kind(*PODS).items()}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def kustomization() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))
    return found


def example_environment() -> dict[str, str]:
    lines = [line for line in ENVIRONMENT.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with throwaway_postgres() as made:
        yield made


def commands() -> list[list[str]]:
    """Return each command of a container of the image, of the unit of systemd and of a probe."""
    found = []
    for pod in pods().values():
        for container in containers(pod):
            if container["image"] == "adtally":
                found.append(container["command"])
            probes = [container.get(name, {}) for name in ("readinessProbe", "livenessProbe")]
            found += [probe["exec"]["command"] for probe in probes if "exec" in probe]
    unit = (DEPLOY / "machines" / "adtally.service").read_text("utf-8")
    started = re.search(r"^ExecStart=\S+/(.+)$", unit, flags=re.MULTILINE)
    assert started is not None
    return [*found, started[1].split()]


# What the objects name


def test_every_file_is_listed_and_every_name_is_that_of_an_object() -> None:
    listed = kustomization()
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml", "access.example.yaml"}
    assert set(listed["resources"]) == files
    generated = {each["name"]: each["files"] for each in listed["configMapGenerator"]}
    assert all((KUBERNETES / file).exists() for names in generated.values() for file in names)
    maps, secrets = {*of_kind("ConfigMap"), *generated}, set(of_kind("Secret"))
    for name, pod in pods().items():
        spec = pod["spec"]
        assert spec["serviceAccountName"] in of_kind("ServiceAccount"), name
        for volume in spec["volumes"]:
            assert volume.keys() <= {"name", "emptyDir", "configMap"}, f"{name} has a volume that outlives it"
            assert "configMap" not in volume or volume["configMap"]["name"] in maps, name
        for container in containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= {each["name"] for each in spec["volumes"]}
            for source in container["envFrom"]:
                assert source.get("configMapRef", {"name": "settings"})["name"] in maps
                assert source.get("secretRef", {"name": "access"})["name"] in secrets
            assert container["image"] in {image["name"] for image in listed["images"]}


def test_services_and_rules_of_the_network_select_pods_and_their_ports() -> None:
    labels = {tuple(pod["metadata"]["labels"].items()): pod for pod in pods().values()}
    for name, found in of_kind(*PODS).items():
        assert found["spec"]["selector"]["matchLabels"] == found["spec"]["template"]["metadata"]["labels"], name
    for name, service in of_kind("Service").items():
        selected = labels[tuple(service["spec"]["selector"].items())]
        open_ports = {port["containerPort"] for container in containers(selected) for port in container.get("ports", [])}
        assert {port["port"] for port in service["spec"]["ports"]} == open_ports, name
    for policy in of_kind("NetworkPolicy").values():
        assert tuple(policy["spec"]["podSelector"]["matchLabels"].items()) in labels


def test_kubernetes_adds_no_variable_that_adtally_refuses() -> None:
    assert [name for name in of_kind("Service") if name.startswith("adtally")] == []
    assert [name for name, pod in pods().items() if pod["spec"]["enableServiceLinks"] is not False] == []


def test_only_the_sign_in_is_reached_from_outside_and_only_it_has_its_secret() -> None:
    for pod in pods().values():
        for container in containers(pod):
            secrets = {source["secretRef"]["name"] for source in container["envFrom"] if "secretRef" in source}
            assert secrets == ({"sign-in"} if container["name"] == "sign-in" else {"access"})
    web = {name: pods()[name]["spec"]["containers"] for name in ("webserver", "console")}
    for name, (own, sign_in) in web.items():
        assert "ports" not in own, name
        command = own["command"]
        port = command[command.index("--port") + 1]
        assert f"--upstream=http://127.0.0.1:{port}" in sign_in["args"]
        assert "--host" not in command or command[command.index("--host") + 1] == "127.0.0.1"


def test_the_runs_have_the_image_of_the_code_location() -> None:
    image = next(each for each in kustomization()["images"] if each["name"] == "adtally")
    environment = {each["name"]: each["value"] for each in containers(pods()["code-location"])[0]["env"]}
    assert environment["DAGSTER_CURRENT_IMAGE"] == f"{image['newName']}:{image['newTag']}"


# Commands and settings


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_each_command_and_its_options_exist(command: list[str]) -> None:
    if command[:2] == ["python", "-m"]:
        assert (ROOT / f"{command[2].replace('.', '/')}.py").exists()
        return
    words = itertools.takewhile(lambda word: not word.startswith("-"), command[1:])
    program = terminal.PROGRAM if command[0] == "adtally" else (str(Path(sys.executable).with_name(command[0])),)
    done = subprocess.run([*program, *words, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    options = [word.split("=")[0] for word in command if word.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b", done.stdout)] == []


def test_the_settings_are_those_of_adtally(monkeypatch: pytest.MonkeyPatch) -> None:
    given = of_kind("ConfigMap")["settings"]["data"] | of_kind("Secret")["access"]["stringData"]
    secrets = {f"ADTALLY_{name.upper()}" for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert not secrets & of_kind("ConfigMap")["settings"]["data"].keys()
    for environment in (given, example_environment()):
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            settings = load_settings()  # refuses a name that it does not know
            assert settings.lakehouse_uri == "s3://bucket/prefix"
            assert settings.dagster_storage is not None
            assert str(settings.home_path) == "/var/lib/adtally"
    assert [name for name, value in example_environment().items() if name in secrets and "change-me" not in value] == []


# Dagster's part


def test_dagster_loads_the_instance_and_the_pools_are_limited(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = terminal.environment(ADTALLY_DAGSTER_STORAGE=postgres.url, DAGSTER_HOME=str(tmp_path))
    monkeypatch.setenv("ADTALLY_DAGSTER_STORAGE", postgres.url)
    (tmp_path / "dagster.yaml").write_text((KUBERNETES / "config" / "dagster.yaml").read_text("utf-8"))
    prepare = next(each for each in containers(pods()["daemon"]) if each["name"] == "prepare")["command"]
    done = subprocess.run([sys.executable, *prepare[1:]], env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    with DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path))) as instance:
        assert type(instance.run_storage).__name__ == "PostgresRunStorage"
        assert {limit.name for limit in instance.event_log_storage.get_pool_limits()} == set(POOLS)
        assert instance.run_monitoring_enabled and instance.run_retries_enabled
        assert type(instance.compute_log_manager).__name__ == "NoOpComputeLogManager"


def test_the_instance_has_the_limits_and_retries_of_adtally_up() -> None:
    ours = yaml.safe_load((ROOT / "orchestration" / "up" / "dagster.yaml").read_text("utf-8"))
    deployed = yaml.safe_load((KUBERNETES / "config" / "dagster.yaml").read_text("utf-8"))
    own = {"storage", "run_launcher", "compute_logs"}
    ours["concurrency"]["runs"] = deployed["concurrency"]["runs"]  # as many as the nodes carry
    assert {name: part for name, part in deployed.items() if name not in own} == ours


def test_a_run_is_a_pod_that_has_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kubernetes = pytest.importorskip("dagster_k8s", reason="dagster-k8s is not installed (extra kubernetes)")
    from dagster._config import process_config, resolve_to_config_type
    from dagster_k8s.container_context import K8sContainerContext
    from dagster_k8s.job import construct_dagster_k8s_job

    monkeypatch.setenv("ADTALLY_DAGSTER_STORAGE", "postgresql+psycopg2://adtally:secret@postgres/dagster")
    (tmp_path / "dagster.yaml").write_text((KUBERNETES / "config" / "dagster.yaml").read_text("utf-8"))
    launcher = InstanceRef.from_dir(str(tmp_path)).run_launcher_data
    assert launcher is not None
    checked = process_config(resolve_to_config_type(kubernetes.K8sRunLauncher.config_type()), launcher.config_dict)
    assert checked.success, checked.errors
    monkeypatch.setattr("kubernetes.config.load_incluster_config", lambda: None)
    made = launcher.rehydrate(kubernetes.K8sRunLauncher)
    context = K8sContainerContext.create_for_run(DagsterRun(job_name="job"), made, include_run_tags=False)
    job = construct_dagster_k8s_job(
        context.get_k8s_job_config("adtally:1", made), ["dagster", "api"], "run", user_defined_k8s_config=context.run_k8s_config
    ).to_dict()
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["enable_service_links"] is False
    assert pod["service_account_name"] in of_kind("ServiceAccount")
    assert {source["secret_ref"]["name"] for source in container["env_from"] if source["secret_ref"]} == {"access"}
    assert {source["config_map_ref"]["name"] for source in container["env_from"] if source["config_map_ref"]} == {"settings"}
    assert {mount["mount_path"] for mount in container["volume_mounts"]} == {"/var/lib/adtally"}  # Dagster passes the instance
    assert "secret@postgres" not in str(job)


def test_dagster_finds_the_code_location_where_its_service_is() -> None:
    (origin,) = WorkspaceFileTarget([str(KUBERNETES / "config" / "workspace.yaml")]).create_origins()
    assert isinstance(origin, GrpcServerCodeLocationOrigin)
    service = of_kind("Service")[origin.host]
    assert origin.port == service["spec"]["ports"][0]["port"]
    command = containers(pods()["code-location"])[0]["command"]
    assert command[command.index("--port") + 1] == str(origin.port)
    assert command[command.index("--location-name") + 1] == origin.location_name == LOCATION


# The image


def test_the_image_has_every_package_the_extras_and_the_uv_of_the_project() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    copied = {source for line in re.findall(r"^COPY (.+)$", dockerfile, flags=re.MULTILINE) for source in line.split()[:-1]}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]) <= copied
    assert set(re.findall(r"--extra (\S+)", dockerfile)) == set(project["project"]["optional-dependencies"])
    uv = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    assert uv is not None and f"uv=={uv[1]}" in dockerfile
    python = re.search(r"^FROM python:(\d+\.\d+)", dockerfile, flags=re.MULTILINE)
    assert python is not None and python[1] == "3.11"
    secrets = re.findall(r"SECRET|PASSWORD|ACCESS_KEY|postgresql", dockerfile)
    assert secrets == []
