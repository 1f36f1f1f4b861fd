with

minutes as (

    select * from {{ ref('int_spend__by_minute') }}

),

days as (

    select
        campaign_id,
        currency,
        event_date,
        sum(spend_nanos) as spend_nanos
    from minutes
    group by campaign_id, currency, event_date

),

hours as (

    select
        campaign_id,
        currency,
        event_date,
        hour(event_minute) as hour_of_day,
        sum(spend_nanos) as spend_nanos
    from minutes
    group by campaign_id, currency, event_date, hour(event_minute)

),

clock as (

    select unnest(range(24)) as hour_of_day

),

dense_hours as (

    select
        days.campaign_id,
        days.currency,
        days.event_date,
        clock.hour_of_day,
        days.spend_nanos as day_nanos,
        coalesce(hours.spend_nanos, 0) as hour_nanos
    from days
    cross join clock
    left join hours
        on
            days.campaign_id = hours.campaign_id
            and days.currency = hours.currency
            and days.event_date = hours.event_date
            and clock.hour_of_day = hours.hour_of_day

),

-- The share of a day's spend by the end of each hour. A day whose spend sums to 0 is skipped.
shares as (

    select
        campaign_id,
        currency,
        event_date,
        hour_of_day,
        case
            when day_nanos > 0
                then
                    sum(hour_nanos) over (
                        partition by campaign_id, currency, event_date order by hour_of_day asc
                    ) / cast(day_nanos as double)
        end as share_at_end
    from dense_hours

),

curves as (

    select
        campaign_id,
        currency,
        event_date,
        hour_of_day,
        avg(share_at_end) over previous_days as share_at_end,
        count(share_at_end) over previous_days as history_days
    from shares
    window
        previous_days as (
            partition by campaign_id, currency, hour_of_day
            order by event_date asc
            range between interval 28 days preceding and interval 1 day preceding
        )

),

final as (

    select
        campaign_id,
        currency,
        event_date,
        hour_of_day,
        history_days,
        share_at_end,
        coalesce(
            lag(share_at_end) over (partition by campaign_id, currency, event_date order by hour_of_day asc), 0
        ) as share_at_start
    from curves

)

select * from final
