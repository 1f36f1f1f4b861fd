-- Every build replaces the rows of the groups of marts that it built and keeps those of the others.
with

builds as (

    select * from {{ build_table('builds') }}

),

versions as (

    select * from {{ build_table('versions') }}

),

earlier as (

    select * from {{ build_table('earlier') }}

),

final as (

    select
        builds.mart_group,
        builds.build_id,
        builds.built_at,
        builds.git_revision,
        builds.project_version,
        builds.project_hash,
        builds.inputs_hash,
        builds.previous_build_id,
        versions.table_name,
        versions.table_id,
        versions.delta_version,
        '{{ dbt_version }}' as dbt_version,
        version() as duckdb_version
    from builds
    cross join versions
    union all
    select
        earlier.mart_group,
        earlier.build_id,
        earlier.built_at,
        earlier.git_revision,
        earlier.project_version,
        earlier.project_hash,
        earlier.inputs_hash,
        earlier.previous_build_id,
        earlier.table_name,
        earlier.table_id,
        earlier.delta_version,
        earlier.dbt_version,
        earlier.duckdb_version
    from earlier

)

select * from final
