-- Per date and measure: the increments, the minutes, the days.
{{ config(severity='error') }}

with

increments as (

    select
        cast(event_minute as date) as event_date,
        sum(impressions) as impressions,
        sum(clicks) as clicks,
        sum(invalid_impressions) as invalid_impressions,
        sum(invalid_clicks) as invalid_clicks
    from {{ ref('int_increments__completed') }}
    group by cast(event_minute as date)

),

minutes as (

    select
        event_date,
        sum(impressions) as impressions,
        sum(clicks) as clicks,
        sum(invalid_impressions) as invalid_impressions,
        sum(invalid_clicks) as invalid_clicks
    from {{ ref('fct_campaign_minute') }}
    group by event_date

),

days as (

    select
        event_date,
        sum(impressions) as impressions,
        sum(clicks) as clicks,
        sum(invalid_impressions) as invalid_impressions,
        sum(invalid_clicks) as invalid_clicks
    from {{ ref('fct_campaign_day') }}
    group by event_date

),

measured as (

    select * from increments
    union all
    select * from minutes
    union all
    select * from days

)

-- A date without three equal rows is a failure.
select
    event_date,
    impressions,
    clicks,
    invalid_impressions,
    invalid_clicks,
    count(*) as grains
from measured
group by event_date, impressions, clicks, invalid_impressions, invalid_clicks
having count(*) <> 3
