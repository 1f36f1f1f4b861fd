-- Per campaign and day, and per campaign and week, the users' events are the billable ones of the increments.
{{ config(severity='error') }}

with

increments as (

    select
        cast(event_minute as date) as event_date,
        campaign_id,
        impressions,
        clicks
    from {{ ref('int_increments__completed') }}

),

measured as (

    select
        period,
        period_start,
        campaign_id,
        impressions,
        clicks
    from {{ ref('fct_user_frequency') }}
    union all
    select
        'day' as period,
        event_date as period_start,
        campaign_id,
        -impressions as impressions,
        -clicks as clicks
    from increments
    union all
    select
        'week' as period,
        cast(date_trunc('week', event_date) as date) as period_start,
        campaign_id,
        -impressions as impressions,
        -clicks as clicks
    from increments
    union all
    -- the users of a row times what each of them saw
    select
        'row' as period,
        period_start,
        campaign_id,
        impressions - users * impressions_per_user as impressions,
        0 as clicks
    from {{ ref('fct_user_frequency') }}

)

select
    period,
    period_start,
    campaign_id,
    sum(impressions) as impressions_too_many,
    sum(clicks) as clicks_too_many
from measured
group by period, period_start, campaign_id
having sum(impressions) <> 0 or sum(clicks) <> 0
