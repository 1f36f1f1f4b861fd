-- The builds that are published now. `adtally marts build` adds the earlier ones from the file that it replaces.
with

builds as (

    select *
    from {{ ref('mart_build') }}
    order by mart_group asc, table_name asc

),

final as (

    select
        mart_group,
        build_id,
        any_value(built_at) as built_at,
        any_value(git_revision) as git_revision,
        any_value(project_version) as project_version,
        any_value(project_hash) as project_hash,
        any_value(inputs_hash) as inputs_hash,
        any_value(previous_build_id) as previous_build_id,
        cast(json_group_object(table_name, delta_version) as varchar) as delta_versions,
        cast(json_group_object(table_name, table_id) as varchar) as table_ids
    from builds
    group by mart_group, build_id

)

select * from final
