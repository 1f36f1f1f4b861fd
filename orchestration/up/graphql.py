"""Asks Dagster's webserver by GraphQL, without an import of Dagster."""

from __future__ import annotations

import json
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from pydantic import SecretStr

_DIRECT = build_opener(ProxyHandler({}))  # no proxy between processes of one machine

_ERROR = "__typename ... on PythonError { message }"
_LOCATIONS = f"""{{ workspaceOrError {{ {_ERROR} ... on Workspace {{
    locationEntries {{ name loadStatus locationOrLoadError {{ {_ERROR} }} }} }} }} }}"""
_IN_PROGRESS = f"""query InProgress($tags: [ExecutionTag!]!) {{
    runsOrError(filter: {{statuses: [STARTING, STARTED, CANCELING], tags: $tags}}, limit: 100) {{
        {_ERROR} ... on Runs {{ results {{ runId }} }} }} }}"""
_TERMINATE = f"""mutation End($ids: [String!]!) {{
    terminateRuns(runIds: $ids, terminatePolicy: SAFE_TERMINATE) {{ {_ERROR} }} }}"""
_STATUS = f"query Of($id: ID!) {{ runOrError(runId: $id) {{ {_ERROR} ... on Run {{ status jobName }} }} }}"
_AGAIN = f"""mutation Again($id: String!) {{
    launchRunReexecution(reexecutionParams: {{parentRunId: $id, strategy: ALL_STEPS}}) {{
        {_ERROR} ... on LaunchRunSuccess {{ run {{ runId }} }} }} }}"""
_RELOAD = f"mutation Reload($name: String!) {{ reloadRepositoryLocation(repositoryLocationName: $name) {{ {_ERROR} }} }}"

_LAUNCHER_TAG = ".dagster/grpc_info"  # the hidden tag of a run that names the code server which started it


class WebserverError(Exception):
    """The webserver does not answer, or answers with an error."""


class Webserver:
    """The webserver at an address such as http://127.0.0.1:3000, with the token that it wants, if any."""

    def __init__(self, address: str, *, token: SecretStr | None = None, timeout: float = 15.0) -> None:
        self.address, self._timeout = address, timeout
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token.get_secret_value()}"

    def ask(self, query: str, **variables: object) -> dict[str, Any]:
        """Return the data of a query. Raises WebserverError."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        try:
            with _DIRECT.open(Request(f"{self.address}/graphql", body, self._headers), timeout=self._timeout) as response:
                answer = json.load(response)
        except (OSError, ValueError) as error:
            raise WebserverError(str(error)) from None
        if answer.get("errors"):
            raise WebserverError(str(answer["errors"][0].get("message")))
        data: dict[str, Any] = answer["data"]
        for value in data.values():
            if isinstance(value, dict) and value.get("__typename") == "PythonError":
                raise WebserverError(str(value["message"]))
        return data

    def load_error(self) -> str | None:
        """Return why the definitions cannot be loaded, or None. Raises WebserverError while they are loading."""
        entries = self.ask(_LOCATIONS)["workspaceOrError"]["locationEntries"]
        if not entries or any(entry["loadStatus"] == "LOADING" for entry in entries):
            raise WebserverError("the definitions are loading")
        for entry in entries:
            found = entry["locationOrLoadError"] or {"__typename": "PythonError", "message": "no code location"}
            if found["__typename"] == "PythonError":
                return str(found["message"])
        return None

    def runs_of(self, socket: str) -> list[str]:
        """Return the ids of the runs in progress that the code server at this socket started."""
        launcher = {"key": _LAUNCHER_TAG, "value": json.dumps({"host": "localhost", "socket": socket})}
        return [run["runId"] for run in self.ask(_IN_PROGRESS, tags=[launcher])["runsOrError"]["results"]]

    def terminate(self, run_ids: list[str]) -> None:
        """Ask runs to end. Each is interrupted, cleans up and counts as cancelled."""
        self.ask(_TERMINATE, ids=run_ids)

    def run_again(self, run_id: str) -> str | None:
        """Queue a cancelled run again; return the id of the new run, or None if the run was not cancelled."""
        run = self.ask(_STATUS, id=run_id)["runOrError"]
        if run.get("status") != "CANCELED":
            return None
        launched = self.ask(_AGAIN, id=run_id)["launchRunReexecution"]
        if launched["__typename"] != "LaunchRunSuccess":
            raise WebserverError(f"run {run_id} of {run['jobName']} cannot be made again: {launched['__typename']}")
        return str(launched["run"]["runId"])

    def reload(self, location: str) -> None:
        """Load the definitions again, in a new process beside the old one. Returns when they are loaded."""
        self.ask(_RELOAD, name=location)
