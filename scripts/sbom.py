"""Build and check the bill of materials (CycloneDX) of all that is installed or started: Python packages, jars, browser code.

    python scripts/sbom.py [PATH]        write it, default dist/adtally.cdx.json; exit status 1 where something is missing in it

It says the same on every run: packages come from uv.lock, jars from the lock files and from the Spark that is installed, browser
code from the console's vendor.toml.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
VENDORED = ROOT / "orchestration" / "console" / "static" / "vendor"
VENDORED_LIST = VENDORED / "vendor.toml"
DEFAULT = ROOT / "dist" / "adtally.cdx.json"
LOCK = ROOT / "uv.lock"
SPARK_JARS_LOCK = ROOT / "spark_jobs" / "jars.lock.json"
SERVICE_LOCKS = sorted((ROOT / "services" / "launcher" / "conf").glob("*/jars.lock.json"))

_IVY_NAME = re.compile(r"(?P<group>[^_]+)_(?P<artifact>.+)-(?P<version>\d[\w.]*)\.jar")
_FILE_NAME = re.compile(r"(?P<artifact>.+?)-(?P<version>\d[\w.+]*(-\d[\w.]*|-jre)*)\.jar")
_POM = re.compile(r"META-INF/maven/(?P<group>[^/]+)/(?P<artifact>[^/]+)/pom\.properties")
# Maven's groups of the jars within Spark that do not name their own
_GROUPS = {
    **dict.fromkeys(("algebra", "cats-kernel", "spire", "spire-macros", "spire-platform", "spire-util"), "org.typelevel"),
    **dict.fromkeys(("breeze", "breeze-macros"), "org.scalanlp"),
    **dict.fromkeys(("chill", "chill-java"), "com.twitter"),
    **dict.fromkeys(("derby", "derbyshared", "derbytools"), "org.apache.derby"),
    **dict.fromkeys(("json4s-ast", "json4s-core", "json4s-jackson", "json4s-jackson-core", "json4s-scalap"), "org.json4s"),
    **dict.fromkeys(("jta", "transaction-api"), "javax.transaction"),
    **dict.fromkeys(("libfb303", "libthrift"), "org.apache.thrift"),
    **dict.fromkeys(("scala-compiler", "scala-library", "scala-reflect"), "org.scala-lang"),
    **dict.fromkeys(("scala-parallel-collections", "scala-parser-combinators", "scala-xml"), "org.scala-lang.modules"),
    "RoaringBitmap": "org.roaringbitmap",
    "arpack_combined_all": "net.sourceforge.f2j",
    "hadoop-client-runtime": "org.apache.hadoop",
    "hive-shims": "org.apache.hive",
    "ivy": "org.apache.ivy",
    "jackson-module-scala": "com.fasterxml.jackson.module",
    "jdo-api": "javax.jdo",
    "jsr305": "com.google.code.findbugs",
    "objenesis": "org.objenesis",
    "oro": "oro",
    "rocksdbjni": "org.rocksdb",
    "snappy-java": "org.xerial.snappy",
    "stax-api": "stax",
    "tink": "com.google.crypto.tink",
    "xz": "org.tukaani",
    "zstd-jni": "com.github.luben",
}
_NOT_LOCKED = {"adtally", "pip", "setuptools", "uv", "wheel"}  # the project, and what makes the environment


@dataclass(frozen=True, order=True)
class Component:
    """A package or jar. ``group`` is Maven's, None for a package of PyPI or npm; "" for a jar that does not say its own."""

    group: str | None
    name: str
    version: str
    used_by: str
    hashes: tuple[tuple[str, str], ...]  # (file, SHA-256 in hexadecimal)

    @property
    def ecosystem(self) -> str:
        """The kind of registry that the component comes from, as OSV calls it."""
        if self.group is not None:
            return "Maven"
        return "npm" if self.used_by == "console" else "PyPI"

    @property
    def purl(self) -> str | None:
        """The package URL; None for a jar without a group."""
        if self.group is None:
            return f"pkg:{self.ecosystem.lower()}/{quote(self.name)}@{quote(self.version)}"
        return f"pkg:maven/{quote(self.group)}/{quote(self.name)}@{quote(self.version)}" if self.group else None

    def as_dict(self) -> dict[str, Any]:
        """As CycloneDX has it."""
        found: dict[str, Any] = {"type": "library", "bom-ref": f"{self.used_by}:{self.group or ''}:{self.name}@{self.version}"}
        if self.group:
            found["group"] = self.group
        found |= {"name": self.name, "version": self.version}
        if self.purl:
            found["purl"] = self.purl
        references = [
            {"type": "distribution", "url": quote(file), "hashes": [{"alg": "SHA-256", "content": digest}]}
            for file, digest in self.hashes
        ]
        return found | {"externalReferences": references, "properties": [{"name": "adtally:used_by", "value": self.used_by}]}


def python_packages() -> Iterator[Component]:
    """Packages of uv.lock but the project itself."""
    for package in tomllib.loads(LOCK.read_text("utf-8"))["package"]:
        if "registry" not in package["source"]:
            continue
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        hashes = sorted((file["url"].rsplit("/", 1)[-1], file["hash"].removeprefix("sha256:")) for file in files)
        yield Component(None, package["name"], package["version"], "python", tuple(hashes))


def jars() -> Iterator[Component]:
    """Jars that are resolved by the lock files, and those that Spark's package brings."""
    for jar in json.loads(SPARK_JARS_LOCK.read_text("utf-8"))["jars"]:
        found = _IVY_NAME.fullmatch(jar["name"])
        if found is None:
            raise ValueError(f"{SPARK_JARS_LOCK}: {jar['name']} is not group_artifact-version.jar")
        yield Component(found["group"], found["artifact"], found["version"], "ingest", ((jar["name"], jar["sha256"]),))
    for path in SERVICE_LOCKS:
        for jar in json.loads(path.read_text("utf-8"))["jars"]:
            end = f"-{jar['classifier']}" if jar["classifier"] else ""
            file = f"{jar['artifact']}-{jar['version']}{end}.jar"
            yield Component(jar["group"], jar["artifact"] + end, jar["version"], path.parent.name, ((file, jar["sha256"]),))
    for jar_file in spark_jar_files():
        yield _jar_of_spark(jar_file)


def browser_packages() -> Iterator[Component]:
    """Packages of npm of which the console serves copies."""
    for package in tomllib.loads(VENDORED_LIST.read_text("utf-8"))["package"]:
        yield Component(None, package["name"], package["version"], "console", tuple(sorted(package["files"].items())))


def spark_jar_files() -> list[Path]:
    """The jars within the installed pyspark."""
    spec = find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("pyspark is not installed")
    return sorted((Path(spec.origin).parent / "jars").glob("*.jar"))


@cache
def _jar_of_spark(path: Path) -> Component:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with zipfile.ZipFile(path) as archive:
        poms = [_POM.fullmatch(name) for name in archive.namelist()]
    # a jar may hold those of others: its own is the one that its file is called by
    own = [pom for pom in poms if pom and re.fullmatch(rf"{re.escape(pom['artifact'])}-\d.*", path.name)]
    if own:
        pom = max(own, key=lambda one: len(one["artifact"]))
        group, artifact = pom["group"], pom["artifact"]
        number = path.name.removeprefix(f"{artifact}-").removesuffix(".jar")
    else:
        named = _FILE_NAME.fullmatch(path.name)
        artifact, number = (named["artifact"], named["version"]) if named else (path.stem, version("pyspark"))
        group = "org.apache.spark" if artifact.startswith("spark-") else _GROUPS.get(artifact.removesuffix("_2.13"), "")
    return Component(group, artifact, number, "spark", ((path.name, digest),))


def components() -> list[Component]:
    """All of it, in a fixed order."""
    return sorted(
        {*python_packages(), *jars(), *browser_packages()}, key=lambda one: (one.used_by, one.group or "", one.name, one.version)
    )


def bill(found: list[Component]) -> dict[str, Any]:
    """The bill of materials as CycloneDX 1.6. Its number follows from what it says."""
    listed = [component.as_dict() for component in found]
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(listed, sort_keys=True))
    project = {"type": "application", "bom-ref": "adtally", "name": "adtally", "version": version("adtally")}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        "metadata": {"component": project},
        "components": listed,
    }


def problems(text: str) -> list[str]:
    """What is wrong with a bill: its form by CycloneDX's schema, what is installed and not in it, what has no hash."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        return [f"it is not CycloneDX 1.6: {str(wrong).splitlines()[0]}"]
    listed = json.loads(text).get("components", [])
    references = [component["bom-ref"] for component in listed]
    found = [f"{name} is in it twice" for name in sorted({name for name in references if references.count(name) > 1})]
    found += [f"{one['bom-ref']} has no hash" for one in listed if not one.get("externalReferences")]
    found += [f"{one['bom-ref']} has no group: no advisory can be found for it" for one in listed if "purl" not in one]
    packages = {(one["name"], one["version"]) for one in listed if one.get("purl", "").startswith("pkg:pypi/")}
    for installed in distributions():
        name = re.sub(r"[-_.]+", "-", installed.metadata["Name"]).lower()
        if name not in _NOT_LOCKED and (name, installed.version) not in packages:
            found.append(f"the installed package {name} {installed.version} is not in it")
    digests = {hashed["content"] for one in listed for file in one["externalReferences"] for hashed in file["hashes"]}
    for path in (SPARK_JARS_LOCK, *SERVICE_LOCKS):
        found += [
            f"a jar of {path.relative_to(ROOT)} is not in it: {jar}"
            for jar in json.loads(path.read_text("utf-8"))["jars"]
            if jar["sha256"] not in digests
        ]
    for path in sorted(VENDORED.iterdir()):
        if path != VENDORED_LIST and hashlib.sha256(path.read_bytes()).hexdigest() not in digests:
            found.append(f"the console's {path.name} is not in it as it is")
    files = {file["url"] for one in listed for file in one["externalReferences"]}
    return found + [f"Spark's {jar.name} is not in it" for jar in spark_jar_files() if quote(jar.name) not in files]


def main(arguments: list[str]) -> int:
    """Write the bill and check it; 1 where it is wrong."""
    path = Path(arguments[0]) if arguments else DEFAULT
    found = components()
    text = json.dumps(bill(found), indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    wrong = problems(text)
    for line in wrong:
        print(f"sbom: error: {line}", file=sys.stderr)
    count = Counter(component.ecosystem for component in found)
    print(f"sbom: {count['PyPI']} Python packages, {count['Maven']} jars and {count['npm']} packages of npm in {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
