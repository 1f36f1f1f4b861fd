-- Every build of mart_build is in mart_build_history.
{{ config(severity='error') }}

with

builds as (

    select distinct
        mart_group,
        build_id
    from {{ ref('mart_build') }}

),

history as (

    select * from {{ ref('mart_build_history') }}

)

select builds.*
from builds
left join history
    on
        builds.mart_group = history.mart_group
        and builds.build_id = history.build_id
where history.build_id is null
