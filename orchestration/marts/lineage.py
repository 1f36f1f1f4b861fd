"""Finds the columns that a column of a model is made from, by the model's SQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from typing import Any

from sqlglot import exp
from sqlglot.lineage import Node, lineage

ColumnLineage = dict[str, dict[str, list[tuple[str, str]]]]
"""Model, its column, and the columns of models and sources that it is made from; all by dbt's unique ids."""

_DIALECT = "duckdb"


def column_lineage(manifest: Mapping[str, Any], columns_of_sources: Mapping[str, list[str]]) -> ColumnLineage:
    """Return the lineage of all models of a compiled project. ``columns_of_sources``: by the source's name.

    It names direct parents, and no column that only a filter or a join reads.
    """
    models = {unique_id: node for unique_id, node in manifest["nodes"].items() if node["resource_type"] == "model"}
    relations = {unique_id: node["relation_name"] for unique_id, node in (manifest["sources"] | models).items()}
    columns = {unique_id: columns_of_sources[source["name"]] for unique_id, source in manifest["sources"].items()}
    parents = {unique_id: [one for one in node["depends_on"]["nodes"] if one in relations] for unique_id, node in models.items()}
    found: ColumnLineage = {}
    for unique_id in TopologicalSorter(parents).static_order():
        if unique_id in models:
            known = {parent: columns[parent] for parent in parents[unique_id]}
            found[unique_id] = _of_model(models[unique_id]["compiled_code"], relations, known)
            columns[unique_id] = list(found[unique_id])
    return found


def _of_model(sql: str, relations: Mapping[str, str], known: Mapping[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
    names = {f"parent_{number}": parent for number, parent in enumerate(known)}
    for name, parent in names.items():  # a source is a function call, and the database's name changes with each build
        sql = sql.replace(relations[parent], name)
    schema = {name: dict.fromkeys(known[parent], "varchar") for name, parent in names.items()}
    nodes = lineage(None, sql, schema, dialect=_DIALECT, trim_selects=False)
    return {column: sorted(set(_leaves(node, names))) for column, node in nodes.items()}


def _leaves(node: Node, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for each in node.walk():
        table = None if each.downstream else each.expression.find(exp.Table)
        if table is not None and table.name in names:
            yield names[table.name], exp.to_column(each.name).name
