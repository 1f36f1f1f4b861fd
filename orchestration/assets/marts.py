"""The marts, with what dbt says of them: lineage down to the Delta tables, columns, groups, and their tests as checks."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import dagster as dg

from orchestration.assets.dagster_dbt_alone import DagsterDbtTranslator, DbtProject, dbt_assets
from orchestration.assets.lakehouse import OWNERS, TABLE_ASSETS
from orchestration.assets.links import runbook
from orchestration.assets.outcome import translate_errors
from orchestration.listening import listener
from orchestration.marts.build import GROUPS, MartBuild, build_marts
from orchestration.marts.dbt_project import DbtNode, MartsError, Rows, project_dir
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
        """Return a model's spec with its group, description (without the SQL) and file; a mart's with a freshness policy."""
        props = self.get_resource_props(manifest, unique_id)
        source = dg.LocalFileCodeReference(file_path=str(project_dir() / props["original_file_path"]), line_number=1)
        spec = super().get_asset_spec(manifest, unique_id, project)
        spec = spec.merge_attributes(metadata={"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[source])})
        text = str(props.get("description") or "").strip()
        if not is_mart(props):
            return spec.replace_attributes(owners=OWNERS, group_name="marts_staging", description=text)
        return spec.replace_attributes(
            owners=OWNERS,
            group_name="marts",
            description=f"{text}\n\n{runbook('freshness')}",
            freshness_policy=spec.freshness_policy or _FRESH[groups_of(props)[0]],
        )

    def get_asset_key(self, dbt_resource_props: Mapping[str, Any]) -> dg.AssetKey:
        """Return the key of the table asset of a source; a model's name."""
        name = dbt_resource_props["name"]
        return dg.AssetKey(_ASSET_OF_TABLE[name] if dbt_resource_props["resource_type"] == "source" else name)


def groups_of(props: Mapping[str, Any]) -> list[str]:
    """Return the groups of GROUPS that build a mart, in their order."""
    return [group for group in GROUPS if group in props["tags"]]


def marts_asset(manifest: Manifest) -> dg.AssetsDefinition:
    """Return all models of the project as one computation. A run builds the groups of the selected marts."""
    attached = name_tests(attach_tests(manifest))
    translator = MartsTranslator()

    @dbt_assets(manifest=attached, dagster_dbt_translator=translator, name="marts", pool="marts")
    def marts(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        """Build the selected groups of marts from pinned Delta versions, test them, and publish them together."""
        group = group_of_marts(attached, (key.path[-1] for key in context.selected_asset_keys))
        events = _BuildEvents(attached, translator, context)
        report = listener()

        def progress(line: str) -> None:
            context.log.info(line)
            report(line)

        with translate_errors(context):
            try:
                built = build_marts(load_settings(), group, progress=progress)
            except MartsError as error:  # no mart is new, but the checks say why
                yield from events.checks(error.nodes, error.rows)
                raise
        yield from events.models(built)
        yield from events.checks(built.nodes, {})

    return marts


def group_of_marts(manifest: Manifest, names: Iterable[str]) -> str | None:
    """Return the only group that has all the marts among ``names``; None if there is no such group or no mart."""
    marts = {node["name"]: set(groups_of(node)) for node in manifest["nodes"].values() if is_mart(node)}
    asked = [marts[name] for name in names if name in marts]
    common = set(GROUPS).intersection(*asked) if asked else set()
    return common.pop() if len(common) == 1 else None


class _BuildEvents:
    """The results of dbt's nodes as Dagster's events."""

    def __init__(self, manifest: Manifest, translator: MartsTranslator, context: dg.AssetExecutionContext) -> None:
        self._manifest, self._context = manifest, context
        specs = context.assets_def.check_specs_by_output_name.values()
        self._checks = {spec.metadata["dagster_dbt/unique_id"]: spec for spec in specs}
        self._keys = {
            unique_id: translator.get_asset_key(node)
            for unique_id, node in (manifest["nodes"] | manifest["sources"]).items()
            if node["resource_type"] in ("model", "source")
        }

    def models(self, built: MartBuild) -> Iterator[dg.MaterializeResult[None]]:
        """Yield a materialisation for each selected model that was built, and log one for each other model."""
        for node in built.nodes:
            if (key := self._keys.get(node.unique_id)) is None:
                continue
            lineage = {
                column: [dg.TableColumnDep(self._keys[parent], parents_column) for parent, parents_column in parents]
                for column, parents in self._manifest[COLUMN_LINEAGE][node.unique_id].items()
            }
            metadata: dict[str, Any] = {
                "build_id": built.build_id,
                "seconds": node.seconds,
                "delta_versions": built.versions,
                "published": dg.MetadataValue.path(str(built.path)),
                "dagster/column_lineage": dg.TableColumnLineage(lineage),
            }
            if (rows := built.rows.get(key.path[-1])) is not None:
                metadata["dagster/row_count"] = rows
            if key in self._context.selected_asset_keys:
                yield dg.MaterializeResult(asset_key=key, metadata=metadata)
            else:
                self._context.log_event(dg.AssetMaterialization(key, metadata=metadata))

    def checks(self, nodes: Iterable[DbtNode], rows: Rows) -> Iterator[dg.AssetCheckResult]:
        """Yield the result of each selected test that ran, with the rows that it found."""
        for node in nodes:
            spec = self._checks.get(node.unique_id)
            if spec is None or spec.key not in self._context.selected_asset_check_keys or node.status == "skipped":
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
