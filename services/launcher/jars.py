"""Resolves the jars of Kafka and Pinot that their locks pin.

A lock lists every jar. Ivy, which Spark ships, fetches exactly these from Maven Central, or, as Spark does, from the repository of
the variable DEFAULT_ARTIFACT_REPOSITORY. ``spark_jobs.jars`` keeps the cache and checks every jar.

    python -m services.launcher.jars kafka            resolve what is missing, print the folder
    python -m services.launcher.jars kafka --update   resolve pom.xml anew by Maven and rewrite its lock
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

from services.launcher.errors import ServiceError
from spark_jobs.errors import AdtallyError, MachineError
from spark_jobs.jars import (
    RESOLVE_TIMEOUT_SECONDS,
    LockedJar,
    Progress,
    ensure_cached,
    jars_of_spark,
    megabytes,
    parse_lock,
    run_resolver,
    sha256_of,
)
from spark_jobs.java import require_java

CONF = Path(__file__).with_name("conf")
CENTRAL = "https://repo1.maven.org/maven2/"
_LISTED = re.compile(r"^\s+([\w.-]+):([\w.-]+):jar:(?:([\w.-]+):)?([\w.-]+):(?:compile|runtime)")


@dataclass(frozen=True)
class Jar:
    """A jar of a lock, with its coordinates in Maven."""

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
    """The content of a lock file: the service's version and its jars, in the order of the class path."""

    service: str
    version: str
    jars: tuple[Jar, ...]

    @property
    def digest(self) -> str:
        """The name of the cache folder, different for each lock."""
        text = json.dumps([asdict(jar) for jar in self.jars], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def lock_path(service: str) -> Path:
    """Return the path of a service's lock."""
    return CONF / service / "jars.lock.json"


def read_lock(service: str, path: Path | None = None) -> JarLock:
    """Read the lock of a service. Raises MachineError if it is missing or broken."""
    return parse_lock(
        path or lock_path(service),
        lambda data: JarLock(data["service"], data["version"], tuple(Jar(**jar) for jar in data["jars"])),
    )


def ensure_jars(lock: JarLock, cache: Path, java: Path, progress: Progress = lambda _line: None) -> list[Path]:
    """Return the paths of the jars in ``cache``, in the order of the class path; resolve them first if some are missing.

    Raises as `spark_jobs.jars.ensure_cached`.
    """
    jars = [LockedJar(jar.name, jar.size, jar.sha256) for jar in lock.jars]
    return ensure_cached(
        cache / f"{lock.service}-{lock.digest}",
        jars,
        lambda work: _resolve(lock, work, java),
        description=f"{len(lock.jars)} jars of {lock.service} {lock.version}, {megabytes(jars)} MB, once",
        update=f"python -m services.launcher.jars {lock.service} --update",
        progress=progress,
    )


def _resolve(lock: JarLock, work: Path, java: Path) -> list[Path]:
    """Fetch the jars by Ivy."""
    ivy_jars = [jar for jar in jars_of_spark() if jar.name.startswith("ivy-")]
    if not ivy_jars:
        raise MachineError("pyspark, which ships Ivy, is not complete", hint="run `uv sync --frozen`")
    ivy, settings, jars = work / "ivy.xml", work / "ivysettings.xml", work / "jars"
    ivy.write_text(_ivy_module(lock), "utf-8")
    # without poms, because the lock lists all jars; without the repository's checksums, because ours are stronger
    settings.write_text(
        f'<ivysettings><settings defaultResolver="central"/><caches defaultCacheDir={quoteattr(str(work / "cache"))}/>'
        '<resolvers><ibiblio name="central" m2compatible="true" usepoms="false" checksums="" '
        f"root={quoteattr(os.environ.get('DEFAULT_ARTIFACT_REPOSITORY') or CENTRAL)}/></resolvers></ivysettings>",
        "utf-8",
    )
    pattern = f"{jars}/[organisation]_[artifact]-[revision](-[classifier]).[ext]"
    command = [str(java), "-cp", str(ivy_jars[-1]), "org.apache.ivy.Main", "-settings", str(settings), "-ivy", str(ivy)]
    run_resolver([*command, "-retrieve", pattern], work)
    return sorted(jars.glob("*.jar"))


def _ivy_module(lock: JarLock) -> str:
    # two versions of a module stay side by side, as in Maven if their classifiers differ
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


def update_lock(service: str, progress: Progress = print) -> JarLock:
    """Resolve the service's pom.xml by Maven and write its lock. Raises ServiceError if Maven fails. Used to upgrade a service."""
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
        made = []
        for match in filter(None, map(_LISTED.match, listing.read_text("utf-8").splitlines())):
            group, artifact, classifier, version = match.groups()
            end = f"-{classifier}" if classifier else ""
            path = jars / f"{group}.{artifact}-{version}{end}.jar"
            made.append(Jar(group, artifact, version, classifier, path.stat().st_size, sha256_of(path)))
    made.sort(key=lambda jar: jar.name)
    version = next(jar.version for jar in made if jar.artifact in ("kafka_2.13", "pinot-server"))
    lock = JarLock(service, version, tuple(made))
    lock_path(service).write_text(json.dumps(asdict(lock), indent=1) + "\n", "utf-8")
    progress(f"{lock_path(service)}: {len(made)} jars pinned")
    return lock


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m services.launcher.jars`` and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.launcher.jars", description="The jars of a service.")
    parser.add_argument("service", choices=sorted(path.parent.name for path in CONF.glob("*/pom.xml")))
    parser.add_argument("--update", action="store_true", help="resolve pom.xml by Maven and rewrite the lock")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "adtally" / "jars", help="folder of the jars")
    options = parser.parse_args(arguments)
    try:
        lock = update_lock(options.service) if options.update else read_lock(options.service)
        java = require_java().executable
        print(ensure_jars(lock, options.cache, java, lambda line: print(line, file=sys.stderr))[0].parent)
    except AdtallyError as error:
        print(f"adtally: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
