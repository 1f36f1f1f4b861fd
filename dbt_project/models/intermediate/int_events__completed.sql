-- A view, because its readers need few of the columns.
{{ config(materialized='view') }}

with

events as (

    select * from {{ ref('stg_lakehouse__events') }}

),

batches as (

    select * from {{ ref('int_batches__completed') }}

),

final as (

    select
        events.*,
        cast(events.event_time as date) as event_date,
        events.invalid_traffic_rule is not null as is_invalid
    from events
    inner join batches
        on
            events.query_id = batches.query_id
            and events.batch_id = batches.batch_id

)

select * from final
