"""The models and tests of the dbt project as a build runs them: compiled SQL, types, and how a model follows the days."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from typing import Any

from orchestration.marts.manifest import Manifest, is_mart

SCOPES = ("days", "pacing", "weeks", "orders", "revenue")
"""Which days of a model a change reopens, as `meta: scope` of the model names it. `orchestration.marts.changes` computes them."""


@dataclass(frozen=True)
class Model:
    """A model. ``day``: the SQL of a row's day, None unless the model is kept by days. ``columns``: column -> type and description.

    ``required``: columns that are never null. ``groups``: the groups of marts that build it; empty for a model that each build
    makes where it needs it. ``days_before``: model -> the number of days before its own from which this one reads it.
    """

    unique_id: str
    name: str
    relation: str
    sql: str
    description: str
    is_mart: bool
    is_view: bool
    day: str | None
    scope: str
    groups: tuple[str, ...]
    columns: dict[str, tuple[str, str]]
    required: tuple[str, ...]
    parents: tuple[str, ...]
    days_before: dict[str, int]

    @property
    def is_whole(self) -> bool:
        """Whether a build makes all of its rows anew: a mart without days, which is small."""
        return bool(self.groups) and self.day is None


@dataclass(frozen=True)
class Test:
    """A test: its SQL returns the rows that should not be. ``needs_all_days``: it compares whole marts."""

    unique_id: str
    sql: str
    is_warning: bool
    parents: tuple[str, ...]
    needs_all_days: bool


class Project:
    """The compiled project."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        nodes = manifest["nodes"].values()
        self.models = {node["unique_id"]: _model(node) for node in nodes if node["resource_type"] == "model"}
        self.tests = [_test(node, self.models) for node in nodes if node["resource_type"] == "test"]

    @cached_property
    def order(self) -> list[Model]:
        """The models, each after its parents."""
        graph = {unique_id: [one for one in model.parents if one in self.models] for unique_id, model in self.models.items()}
        return [self.models[unique_id] for unique_id in TopologicalSorter(graph).static_order()]

    def of_groups(self, groups: Iterable[str]) -> list[Model]:
        """Return the models that groups of marts build, each after its parents."""
        wanted = set(groups)
        return [model for model in self.order if wanted & set(model.groups)]

    def scratch_of(self, models: Iterable[Model | Test]) -> list[Model]:
        """Return the models, kept by nobody, that ``models`` and their tests read, directly or through each other."""
        found: dict[str, None] = {}
        waiting = [parent for model in models for parent in self.parents_of(model)]
        while waiting:
            model = waiting.pop()
            if not model.groups and model.unique_id not in found:
                found[model.unique_id] = None
                waiting += self.parents_of(model)
        return [model for model in self.order if model.unique_id in found]

    def parents_of(self, node: Model | Test) -> list[Model]:
        """Return the models that a model or a test reads itself."""
        return [self.models[parent] for parent in node.parents if parent in self.models]

    def sources_of(self, models: Iterable[Model]) -> set[str]:
        """Return the names of the Delta tables that models read, also through models that nobody keeps."""
        every = [*models]
        return {
            self._manifest["sources"][parent]["name"]
            for model in (*every, *self.scratch_of(every))
            for parent in model.parents
            if parent in self._manifest["sources"]
        }


def _model(node: dict[str, Any]) -> Model:
    meta, columns = node["config"]["meta"], node["columns"].values()
    return Model(
        unique_id=node["unique_id"],
        name=node["name"],
        relation=node["relation_name"],
        sql=node["compiled_code"],
        description=" ".join(node["description"].split()),
        is_mart=is_mart(node),
        is_view=node["config"]["materialized"] == "view",
        day=meta.get("day"),
        scope=meta.get("scope", "days"),
        groups=tuple(node["tags"]),
        columns={one["name"]: (one["data_type"], one["description"]) for one in columns if one["data_type"]},
        required=tuple(one["name"] for one in columns if any(each["type"] == "not_null" for each in one["constraints"])),
        parents=tuple(node["depends_on"]["nodes"]),
        days_before=meta.get("days_before", {}),
    )


def _test(node: dict[str, Any], models: dict[str, Model]) -> Test:
    return Test(
        unique_id=node["unique_id"],
        sql=node["compiled_code"],
        is_warning=node["config"]["severity"].lower() == "warn",
        parents=tuple(parent for parent in node["depends_on"]["nodes"] if parent in models),
        needs_all_days=bool(node["config"]["meta"].get("all_days")),
    )
