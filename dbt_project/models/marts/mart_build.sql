with

pins as (

    select
        key as table_name,
        cast(value as bigint) as delta_version
    from json_each('{{ var("delta_versions") | tojson }}')

),

final as (

    select
        '{{ var("build_id") }}' as build_id,
        cast('{{ var("built_at") }}' as timestamp) as built_at,
        nullif('{{ var("git_revision") }}', '') as git_revision,
        table_name,
        delta_version,
        '{{ dbt_version }}' as dbt_version,
        version() as duckdb_version
    from pins

)

select * from final
