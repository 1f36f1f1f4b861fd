"""Look for known vulnerabilities of all that is in the bill of materials: Python packages, jars, browser code.

    python scripts/audit.py [--url URL]     ask OSV; exit status 0 only where every one was asked about and none has an advisory
    python scripts/audit.py --list          print what would be asked, as OSV has it, and ask nobody

Exit status 1: advisories were found. 2: not everything could be asked about, so nothing can be said.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from typing import Any

from sbom import Component, components

OSV = "https://api.osv.dev/v1/querybatch"
BATCH = 500  # OSV takes 1,000
TIMEOUT_SECONDS = 60


class AuditError(Exception):
    """No advisory source answers, or it does not answer for everything."""


def queries(found: list[Component]) -> list[dict[str, Any]]:
    """What OSV is asked. Raises AuditError for a jar of which OSV cannot be asked."""
    nameless = [one.name for one in found if one.purl is None]
    if nameless:
        raise AuditError(f"{len(nameless)} jars have no group, so nobody can be asked about them: {', '.join(nameless)}")
    return [
        {
            "package": {"ecosystem": one.ecosystem, "name": one.name if one.group is None else f"{one.group}:{one.name}"},
            "version": one.version,
        }
        for one in found
    ]


def advisories(asked: list[dict[str, Any]], url: str) -> list[list[str]]:
    """Ids of the advisories of each query. Raises AuditError unless every query has an answer."""
    found: list[list[str]] = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        request = urllib.request.Request(url, json.dumps({"queries": part}).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                results = json.load(answer)["results"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AuditError(f"no advisory source can be reached ({url}: {error})") from None
        if len(results) != len(part):
            raise AuditError(f"{url} answers {len(results)} of {len(part)} queries")
        found += [[str(one["id"]) for one in result.get("vulns") or []] for result in results]
    return found


def main(arguments: list[str]) -> int:
    """Ask, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(prog="audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=OSV, help="where OSV's batch API is")
    parser.add_argument("--list", action="store_true", help="print the queries and ask nobody")
    options = parser.parse_args(arguments)
    try:
        asked = queries(components())
        if options.list:
            print(json.dumps({"queries": asked}, indent=1))
            return 0
        found = advisories(asked, options.url)
    except AuditError as error:
        print(f"audit: error: {error}; nothing was audited", file=sys.stderr)
        return 2
    hit = [(query, ids) for query, ids in zip(asked, found, strict=True) if ids]
    for query, ids in hit:
        print(f"{query['package']['ecosystem']} {query['package']['name']} {query['version']}: {', '.join(ids)}")
    print(f"audit: {len(asked)} packages and jars, {len(hit)} with advisories")
    return 1 if hit else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
