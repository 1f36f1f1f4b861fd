with

arrivals as (

    select * from {{ ref('int_arrivals__counted') }}

),

summed_up as (

    select
        *,
        sum(events) over (partition by event_hour, region order by lag_seconds asc) as received,
        sum(events) over (partition by event_hour, region) as all_events
    from arrivals

),

final as (

    select
        event_hour,
        region,
        {{ sum_bigint('events') }} as events,
        {{ sum_bigint('late') }} as late,
        min(lag_seconds) filter (where received * 100 >= all_events * 50) as p50_seconds,
        min(lag_seconds) filter (where received * 100 >= all_events * 95) as p95_seconds,
        min(lag_seconds) filter (where received * 100 >= all_events * 99) as p99_seconds,
        max(lag_seconds) as p100_seconds,
        coalesce(sum(events) filter (where lag_seconds <= 0), 0) / sum(events) as completeness_0_min,
        coalesce(sum(events) filter (where lag_seconds <= 60), 0) / sum(events) as completeness_1_min,
        coalesce(sum(events) filter (where lag_seconds <= 300), 0) / sum(events) as completeness_5_min,
        coalesce(sum(events) filter (where lag_seconds <= 900), 0) / sum(events) as completeness_15_min,
        coalesce(sum(events) filter (where lag_seconds <= 3600), 0) / sum(events) as completeness_60_min,
        coalesce(sum(events) filter (where lag_seconds <= 86400), 0) / sum(events) as completeness_24_h
    from summed_up
    group by event_hour, region

)

select * from final
