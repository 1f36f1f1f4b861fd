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

groups as (

    select unnest({{ var("mart_groups") }}) as mart_group

),

final as (

    select
        groups.mart_group,
        '{{ var("build_id") }}' as build_id,
        cast('{{ var("built_at") }}' as timestamp) as built_at,
        nullif('{{ var("git_revision") }}', '') as git_revision,
        pins.table_name,
        pins.delta_version,
        '{{ dbt_version }}' as dbt_version,
        version() as duckdb_version
    from groups
    cross join pins

)

select * from final
