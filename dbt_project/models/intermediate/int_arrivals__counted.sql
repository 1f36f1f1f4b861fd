with

events as (

    select * from {{ ref('stg_lakehouse__events') }}

),

batches as (

    select * from {{ ref('int_batches__completed') }}

),

timed as (

    select
        events.region,
        events.is_late,
        date_trunc('hour', events.event_time) as event_hour,
        epoch_us(events.received_at) - epoch_us(date_trunc('hour', events.event_time)) - 3600000000 as lag_microseconds
    from events
    inner join batches
        on
            events.query_id = batches.query_id
            and events.batch_id = batches.batch_id

),

final as (

    select
        event_hour,
        region,
        -- whole seconds, rounded up: what has arrived after n seconds has a lag of n at most
        greatest(0, (lag_microseconds + 999999) // 1000000) as lag_seconds,
        count(*) as events,
        count(*) filter (where is_late) as late
    from timed
    group by event_hour, region, greatest(0, (lag_microseconds + 999999) // 1000000)

)

select * from final
