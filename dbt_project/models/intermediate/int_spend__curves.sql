with

minutes as (

    select * from {{ ref('int_spend__by_minute') }}

),

shares as (

    select * from {{ ref('int_spend__shares') }}

),

days as (

    select distinct
        campaign_id,
        currency,
        event_date
    from minutes

),

dates as (

    select distinct event_date from days

),

-- Each day with the 28 days before it. A join by equality: its cost follows the days that a build makes.
previous_days as (

    select
        event_date,
        cast(
            unnest(generate_series(event_date - interval 28 days, event_date - interval 1 day, interval 1 day)) as date
        ) as previous_date
    from dates

),

curves as (

    select
        shares.campaign_id,
        shares.currency,
        previous_days.event_date,
        shares.hour_of_day,
        -- a quotient of whole numbers, and so the same whatever else a build reads
        cast(sum(shares.share_at_end) as double) / (1e15 * nullif(count(shares.share_at_end), 0)) as share_at_end,
        count(shares.share_at_end) as history_days
    from shares
    inner join previous_days on shares.event_date = previous_days.previous_date
    inner join days
        on
            shares.campaign_id = days.campaign_id
            and shares.currency = days.currency
            and previous_days.event_date = days.event_date
    group by shares.campaign_id, shares.currency, previous_days.event_date, shares.hour_of_day

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
            lag(share_at_end) over (
                partition by campaign_id, currency, event_date order by hour_of_day asc
            ),
            0
        ) as share_at_start
    from curves

)

select * from final
