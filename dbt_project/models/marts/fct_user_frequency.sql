with

events as (

    select * from {{ ref('int_events__completed') }}

),

days_of_users as (

    select
        event_date,
        campaign_id,
        user_id,
        count(*) filter (where event_type = 'impression') as impressions,
        count(*) filter (where event_type = 'click') as clicks
    from events
    where not is_invalid
    group by event_date, campaign_id, user_id

),

-- A user who appears on two days is one user of the week, so weeks are counted from users, not from days.
periods_of_users as (

    select
        'day' as period,
        event_date as period_start,
        campaign_id,
        impressions,
        clicks
    from days_of_users
    union all
    select
        'week' as period,
        cast(date_trunc('week', event_date) as date) as period_start,
        campaign_id,
        sum(impressions) as impressions,
        sum(clicks) as clicks
    from days_of_users
    group by date_trunc('week', event_date), campaign_id, user_id

),

final as (

    select
        period,
        period_start,
        campaign_id,
        cast(impressions as bigint) as impressions_per_user,
        count(*) as users,
        {{ sum_bigint('impressions') }} as impressions,
        {{ sum_bigint('clicks') }} as clicks
    from periods_of_users
    group by period, period_start, campaign_id, impressions

)

select * from final
