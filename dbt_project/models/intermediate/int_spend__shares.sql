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

cumulated as (

    select
        *,
        sum(hour_nanos) over (
            partition by campaign_id, currency, event_date order by hour_of_day asc
        ) as cumulated_nanos
    from dense_hours

),

-- A day whose spend sums to 0 has no share.
final as (

    select
        campaign_id,
        currency,
        event_date,
        hour_of_day,
        case
            when day_nanos > 0
                then {{ rounded_ratio('1000000000000000 * cumulated_nanos', 'day_nanos') }}
        end as share_at_end
    from cumulated

)

select * from final
