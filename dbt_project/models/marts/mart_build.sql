-- Every build replaces the rows of the groups of marts that it built and keeps those of the others.
{{
    config(
        materialized='incremental',
        incremental_strategy='delete+insert',
        unique_key='mart_group',
        on_schema_change='fail'
    )
}}

with

pins as (

    select
        key as table_name,
        cast(value as bigint) as delta_version
    from json_each('{{ var("delta_versions") | tojson }}')

),

table_ids as (

    select
        key as table_name,
        json_extract_string(value, '$') as table_id
    from json_each('{{ var("table_ids") | tojson }}')

),

previous_builds as (

    select
        key as mart_group,
        json_extract_string(value, '$') as build_id
    from json_each('{{ var("previous_build_ids") | tojson }}')

),

groups as (

    select unnest({{ var("mart_groups") }}) as mart_group

),

final as (

    select
        groups.mart_group,
        '{{ var("build_id") }}' as build_id,
        cast('{{ var("built_at") }}' as timestamp) as built_at,
        nullif('{{ var("git_revision") }}', '') as git_revision,
        '{{ var("project_version") }}' as project_version,
        '{{ var("project_hash") }}' as project_hash,
        '{{ var("inputs_hash") }}' as inputs_hash,
        previous_builds.build_id as previous_build_id,
        pins.table_name,
        table_ids.table_id,
        pins.delta_version,
        '{{ dbt_version }}' as dbt_version,
        version() as duckdb_version
    from groups
    cross join pins
    left join table_ids on pins.table_name = table_ids.table_name
    left join previous_builds on groups.mart_group = previous_builds.mart_group

)

select * from final
