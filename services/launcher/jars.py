"""The jars of a service, resolved once into a cache folder and held to a lock file by name, size and SHA-256.

The lock lists every jar, so nothing is decided while resolving: Ivy, which Spark ships, fetches exactly these from Maven
Central, or from the repository that the variable DEFAULT_ARTIFACT_REPOSITORY names, as Spark itself does. Later starts use
no network.

    python -m services.launcher.jars kafka            resolve what is missing, print the folder
    python -m services.launcher.jars kafka --update   resolve pom.xml anew by Maven and rewrite its lock
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.sax.saxutils import quoteattr

from filelock import FileLock, Timeout

from services.launcher.errors import ServiceBusyError, ServiceError, ServiceUsageError

CONF = Path(__file__).with_name("conf")
RESOLVE_TIMEOUT_SECONDS = 900
CENTRAL = "https://repo1.maven.org/maven2/"
_LISTED = re.compile(r"^\s+([\w.-]+):([\w.-]+):jar:(?:([\w.-]+):)?([\w.-]+):(?:compile|runtime)")


@dataclass(frozen=True)
class Jar:
    """A jar of a lock: its coordinates in Maven, its size in bytes and its SHA-256 in hexadecimal."""

    group: str
    artifact: str
    version: str
    classifier: str | None
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's name in the cache."""
        end = f"-{self.classifier}" if self.classifier else ""
        return f"{self.group}_{self.artifact}-{self.version}{end}.jar"


@dataclass(frozen=True)
class JarLock:
    """What a lock file pins: the service's version and its jars, in the order of the class path."""

    service: str
    version: str
    jars: tuple[Jar, ...]

    @property
    def digest(self) -> str:
        """Names the cache folder: another lock, another folder."""
        text = json.dumps([asdict(jar) for jar in self.jars], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def lock_path(service: str) -> Path:
    """Where the lock of a service lies."""
    return CONF / service / "jars.lock.json"


def read_lock(service: str, path: Path | None = None) -> JarLock:
    """The lock of a service. Raises ServiceUsageError if it is missing or broken."""
    path = path or lock_path(service)
    try:
        data = json.loads(path.read_text("utf-8"))
        return JarLock(data["service"], data["version"], tuple(Jar(**jar) for jar in data["jars"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServiceUsageError(f"{path} cannot be read: {error}", hint="restore it from the repository") from None


def ensure_jars(lock: JarLock, cache: Path, java: Path, progress: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Paths of the jars in ``cache``, resolved first if any is missing or cut short. Every call hashes all of them.

    Several processes may call it at once: one resolves, the others wait. Raises ServiceUsageError if a jar is not the one pinned or
    cannot be resolved, ServiceBusyError if another process takes too long.
    """
    folder = cache / f"{lock.service}-{lock.digest}"
    if _missing(folder, lock):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{folder.name}.lock", timeout=RESOLVE_TIMEOUT_SECONDS):
                if _missing(folder, lock):
                    _fill(folder, lock, java, progress)
        except Timeout:
            raise ServiceBusyError(f"another process has been resolving the jars in {cache} for too long") from None
        except OSError as error:
            raise ServiceUsageError(f"the jar cache {cache} cannot be written: {error}", hint="set ADTALLY_CACHE_DIR") from None
    for jar in lock.jars:
        _check(folder / jar.name, jar, hint=f"delete {folder} and run again")
    return [folder / jar.name for jar in lock.jars]


def _missing(folder: Path, lock: JarLock) -> bool:
    return not all((path := folder / jar.name).is_file() and path.stat().st_size == jar.size for jar in lock.jars)


def _check(path: Path, jar: Jar, *, hint: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != jar.sha256:
        raise ServiceUsageError(f"{path} has SHA-256 {found}, the lock says {jar.sha256}; nothing was started", hint=hint)


def _fill(folder: Path, lock: JarLock, java: Path, progress: Callable[[str], None]) -> None:
    megabytes = sum(jar.size for jar in lock.jars) / 1e6
    progress(f"resolving {len(lock.jars)} jars of {lock.service} {lock.version}, {megabytes:.0f} MB, once into {folder}")
    prefix = f"resolve-{folder.name}-"
    for left in folder.parent.glob(f"{prefix}*"):  # by a process that was killed; the lock is held, so nobody uses it
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as work:
        staged = _resolve(lock, Path(work), java)
        for jar in lock.jars:
            if not (staged / jar.name).is_file():
                raise ServiceUsageError(f"{jar.name} was not among the jars resolved", hint="its lock contradicts the repository")
            _check(staged / jar.name, jar, hint="the repository that answered does not hold the jar this project pins")
        if folder.exists():  # an incomplete folder: files were deleted from it, or cut short
            shutil.rmtree(folder)
        staged.rename(folder)
    progress(f"resolved and checked {len(lock.jars)} jars")


def _resolve(lock: JarLock, work: Path, java: Path) -> Path:
    """Fetch the jars by Ivy; the folder they are in."""
    ivy, settings, jars = work / "ivy.xml", work / "ivysettings.xml", work / "jars"
    ivy.write_text(_ivy_module(lock), "utf-8")
    # no poms: the lock lists all there is; no checksums of the repository: ours are stronger
    settings.write_text(
        f'<ivysettings><settings defaultResolver="central"/><caches defaultCacheDir={quoteattr(str(work / "cache"))}/>'
        '<resolvers><ibiblio name="central" m2compatible="true" usepoms="false" checksums="" '
        f"root={quoteattr(os.environ.get('DEFAULT_ARTIFACT_REPOSITORY') or CENTRAL)}/></resolvers></ivysettings>",
        "utf-8",
    )
    pattern = f"{jars}/[organisation]_[artifact]-[revision](-[classifier]).[ext]"
    command = [str(java), "-cp", str(_ivy_jar()), "org.apache.ivy.Main", "-settings", str(settings), "-ivy", str(ivy)]
    try:
        done = subprocess.run(
            [*command, "-retrieve", pattern],
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=RESOLVE_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceUsageError(f"the jars could not be resolved: {error}", hint="check the network and run again") from None
    if done.returncode != 0:
        said = [line.strip(" :\t") for line in (done.stdout + done.stderr).splitlines()]
        reasons = [line for line in said if "not found" in line or "Exception" in line or "FAILED" in line]
        raise ServiceUsageError(
            f"the jars could not be resolved: {(reasons or said or ['Ivy said nothing'])[0]}",
            hint="check that Maven Central can be reached and run again; later starts need no network",
        )
    return jars


def _ivy_jar() -> Path:
    spec = find_spec("pyspark")
    found = sorted((Path(spec.origin).parent / "jars").glob("ivy-*.jar")) if spec and spec.origin else []
    if not found:
        raise ServiceUsageError("pyspark, which ships Ivy, is not installed", hint="run `uv sync --frozen`")
    return found[-1]


def _ivy_module(lock: JarLock) -> str:
    # two versions of a module stay side by side, as Maven has them where their classifiers differ
    modules: dict[tuple[str, str, str], list[str | None]] = {}
    for jar in lock.jars:
        modules.setdefault((jar.group, jar.artifact, jar.version), []).append(jar.classifier)
    parts = []
    for (group, artifact, version), classifiers in modules.items():
        parts.append(f'<dependency org="{group}" name="{artifact}" rev="{version}" transitive="false" conf="default-&gt;*">')
        for classifier in classifiers:
            extra = f" m:classifier={quoteattr(classifier)}" if classifier else ""
            parts.append(f'<artifact name="{artifact}" type="jar" ext="jar"{extra}/>')
        parts.append("</dependency>")
    return (
        '<ivy-module version="2.0" xmlns:m="http://ant.apache.org/ivy/maven"><info organisation="adtally" module="services"/>'
        f'<configurations><conf name="default"/></configurations><dependencies>{"".join(parts)}'
        '<conflict org="*" module="*" manager="all"/></dependencies></ivy-module>'
    )


def update_lock(service: str, progress: Callable[[str], None] = print) -> JarLock:
    """Resolve the service's pom.xml by Maven and write its lock. For whoever upgrades a service; raises ServiceError."""
    pom = CONF / service / "pom.xml"
    with tempfile.TemporaryDirectory(prefix="adtally-jars-") as work:
        progress(f"resolving {pom} by Maven")
        listing, jars = Path(work) / "list.txt", Path(work) / "jars"
        goals = ["dependency:copy-dependencies", "dependency:list", "-DincludeScope=runtime", "-Dmdep.prependGroupId=true"]
        done = subprocess.run(
            ["mvn", "-B", "-q", "-f", str(pom), *goals, f"-DoutputDirectory={jars}", f"-DoutputFile={listing}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RESOLVE_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise ServiceError(f"Maven could not resolve {pom}: {(done.stdout.strip().splitlines() or [''])[0]}")
        found = [match.groups() for line in listing.read_text("utf-8").splitlines() if (match := _LISTED.match(line))]
        made = []
        for group, artifact, classifier, version in found:
            end = f"-{classifier}" if classifier else ""
            path = jars / f"{group}.{artifact}-{version}{end}.jar"
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            made.append(Jar(group, artifact, version, classifier, path.stat().st_size, digest))
    made.sort(key=lambda jar: jar.name)
    version = next(jar.version for jar in made if jar.artifact in ("kafka_2.13", "pinot-server"))
    lock = JarLock(service, version, tuple(made))
    lock_path(service).write_text(json.dumps(asdict(lock), indent=1) + "\n", "utf-8")
    progress(f"{lock_path(service)}: {len(made)} jars pinned")
    return lock


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m services.launcher.jars``."""
    parser = argparse.ArgumentParser(prog="python -m services.launcher.jars", description="The jars of a service.")
    parser.add_argument("service", choices=sorted(path.parent.name for path in CONF.glob("*/pom.xml")))
    parser.add_argument("--update", action="store_true", help="resolve pom.xml by Maven and rewrite the lock")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "adtally" / "jars", help="folder of the jars")
    options = parser.parse_args(arguments)
    try:
        lock = update_lock(options.service) if options.update else read_lock(options.service)
        java = shutil.which("java")
        if java is None:
            raise ServiceUsageError("Java is not installed")
        print(ensure_jars(lock, options.cache, Path(java), lambda line: print(line, file=sys.stderr))[0].parent)
    except ServiceError as error:
        print(f"adtally: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ServiceUsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
