"""The marts, with what dbt says of them: lineage down to the Delta tables, columns, groups, and their tests as checks."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import dagster as dg

from orchestration.assets.dagster_dbt_alone import DagsterDbtTranslator, DbtProject, dbt_assets
from orchestration.assets.lakehouse import OWNERS, TABLE_ASSETS
from orchestration.assets.links import runbook
from orchestration.assets.outcome import failing_clearly
from orchestration.listening import listener
from orchestration.marts.build import GROUPS, MartBuild, build_marts
from orchestration.marts.dbt_runner import DbtNode, MartsError, Rows, project_dir
from orchestration.marts.manifest import COLUMN_LINEAGE, Manifest, attach_tests, is_mart, name_tests
from spark_jobs.config import load_settings

_ASSET_OF_TABLE = {asset.table.name: asset.key for asset in TABLE_ASSETS} | {
    "reconciliations": "reconciled_hours",
    "restatements": "reviewed_hours",
    "traffic_reviews": "reviewed_hours",
    "rule_sets": "reviewed_hours",
    "attributed_orders": "attributed_orders",
    "billing_lines": "billing_lines",
}
_FRESH = {
    "near_real_time": dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=2), warn_window=timedelta(hours=1)),
    "hourly": dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=12), warn_window=timedelta(hours=6)),
}


class MartsTranslator(DagsterDbtTranslator):
    """dbt's models as assets: sources are the table assets, the folders are the groups."""

    def get_asset_spec(self, manifest: Mapping[str, Any], unique_id: str, project: DbtProject | None) -> dg.AssetSpec:
        """A model's spec; a mart's says how fresh it has to be."""
        spec = super().get_asset_spec(manifest, unique_id, project)
        props = self.get_resource_props(manifest, unique_id)
        source = dg.LocalFileCodeReference(file_path=str(project_dir() / props["original_file_path"]), line_number=1)
        references = dg.CodeReferencesMetadataValue(code_references=[source])
        spec = spec.merge_attributes(metadata={"dagster/code_references": references})
        if not is_mart(dict(props)) or spec.freshness_policy is not None:
            return spec
        return spec.replace_attributes(freshness_policy=_FRESH[groups_of(props)[0]])

    def get_asset_key(self, dbt_resource_props: Mapping[str, Any]) -> dg.AssetKey:
        """The table asset of a source, a model's name."""
        name = dbt_resource_props["name"]
        return dg.AssetKey(_ASSET_OF_TABLE[name] if dbt_resource_props["resource_type"] == "source" else name)

    def get_group_name(self, dbt_resource_props: Mapping[str, Any]) -> str | None:
        """Marts, or what they are made from."""
        return "marts" if is_mart(dict(dbt_resource_props)) else "marts_staging"

    def get_owners(self, dbt_resource_props: Mapping[str, Any]) -> list[str]:
        """The owners of everything here."""
        return list(OWNERS)

    def get_description(self, dbt_resource_props: Mapping[str, Any]) -> str:
        """What dbt's documentation says, without the SQL."""
        text = str(dbt_resource_props.get("description") or "").strip()
        return f"{text}\n\n{runbook('freshness')}" if is_mart(dict(dbt_resource_props)) else text


def groups_of(props: Mapping[str, Any]) -> list[str]:
    """The groups of GROUPS that build a mart, in their order."""
    return [group for group in GROUPS if group in props["tags"]]


def marts_asset(manifest: Manifest) -> dg.AssetsDefinition:
    """All models of the project as one computation, of which a run builds the groups that it was asked for."""
    attached = name_tests(attach_tests(manifest))
    translator = MartsTranslator()

    @dbt_assets(manifest=attached, dagster_dbt_translator=translator, name="marts", pool="marts")
    def marts(context: dg.AssetExecutionContext) -> Iterator[Any]:
        """Build the groups of marts that were asked for from pinned Delta versions, test them, and publish them together."""
        group = asked_for(attached, (key.path[-1] for key in context.selected_asset_keys))
        shown = _Shown(attached, translator, context)
        told = listener()

        def progress(line: str) -> None:
            context.log.info(line)
            told(line)

        with failing_clearly():
            try:
                built = build_marts(load_settings(), group, progress=progress)
            except MartsError as error:  # what is published stays: no mart is new, but its checks say why
                yield from shown.checks(error.nodes, error.rows)
                raise
        yield from shown.models(built)
        yield from shown.checks(built.nodes, {})

    return marts


def asked_for(manifest: Manifest, names: Iterable[str]) -> str | None:
    """The one group that holds all the marts among ``names``; None where it takes more than one, or no mart is among them."""
    marts = {node["name"]: set(groups_of(node)) for node in manifest["nodes"].values() if is_mart(node)}
    asked = [marts[name] for name in names if name in marts]
    common = set(GROUPS).intersection(*asked) if asked else set()
    return common.pop() if len(common) == 1 else None


class _Shown:
    """What became of dbt's nodes, as Dagster's events."""

    def __init__(self, manifest: Manifest, translator: MartsTranslator, context: dg.AssetExecutionContext) -> None:
        self._manifest = manifest
        self._selected = context.selected_asset_keys
        self._selected_checks = context.selected_asset_check_keys
        self._context = context
        specs = context.assets_def.check_specs_by_output_name.values()
        self._checks = {spec.metadata["dagster_dbt/unique_id"]: spec for spec in specs}
        self._keys = {
            unique_id: translator.get_asset_key(node)
            for unique_id, node in (manifest["nodes"] | manifest["sources"]).items()
            if node["resource_type"] in ("model", "source")
        }

    def models(self, built: MartBuild) -> Iterator[dg.MaterializeResult[None]]:
        """A materialisation a model that was built. One that was built along and not asked for is told as well."""
        for node in built.nodes:
            key = self._keys.get(node.unique_id)
            if key is None:
                continue
            metadata: dict[str, Any] = {
                "build_id": built.build_id,
                "seconds": node.seconds,
                "delta_versions": built.versions,
                "published": dg.MetadataValue.path(str(built.path)),
            }
            metadata["dagster/column_lineage"] = self._lineage(node.unique_id)
            rows = built.rows.get(key.path[-1])
            if rows is not None:
                metadata["dagster/row_count"] = rows
            if key in self._selected:
                yield dg.MaterializeResult(asset_key=key, metadata=metadata)
            else:
                self._context.log_event(dg.AssetMaterialization(key, metadata=metadata))

    def _lineage(self, unique_id: str) -> dg.TableColumnLineage:
        deps = {
            column: [dg.TableColumnDep(self._keys[parent], parents_column) for parent, parents_column in parents]
            for column, parents in self._manifest[COLUMN_LINEAGE][unique_id].items()
        }
        return dg.TableColumnLineage(deps)

    def checks(self, nodes: Iterable[DbtNode], rows: Rows) -> Iterator[dg.AssetCheckResult]:
        """An evaluation a test that ran, with the rows that it found."""
        for node in nodes:
            spec = self._checks.get(node.unique_id)
            if spec is None or spec.key not in self._selected_checks or node.status == "skipped":
                continue
            warns = self._manifest["nodes"][node.unique_id]["config"]["severity"].lower() == "warn"
            found = rows.get(node.unique_id)
            yield dg.AssetCheckResult(
                asset_key=spec.asset_key,
                check_name=spec.name,
                passed=node.status == "pass",
                severity=dg.AssetCheckSeverity.WARN if warns else dg.AssetCheckSeverity.ERROR,
                description=node.label if node.failed else None,
                metadata={"failing_rows": node.failures, "seconds": node.seconds, **({"first_rows": found} if found else {})},
            )
