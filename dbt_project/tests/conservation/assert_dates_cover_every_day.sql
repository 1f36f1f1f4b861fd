-- Every day with figures is in dim_date, and dim_date has no other days outside their range.
{{ config(severity='error', meta={'all_days': true}) }}

with

days as (

    select event_date from {{ ref('fct_advertiser_performance') }}

),

bounds as (

    select
        min(event_date) as first_date,
        max(event_date) as last_date,
        date_diff('day', min(event_date), max(event_date)) + 1 as days
    from days

),

dates as (

    select
        min(event_date) as first_date,
        max(event_date) as last_date,
        count(*) as days
    from {{ ref('dim_date') }}

)

select
    bounds.*,
    dates.days as days_found
from bounds
cross join dates
where
    bounds.first_date is distinct from dates.first_date
    or bounds.last_date is distinct from dates.last_date
    or coalesce(bounds.days, 0) <> dates.days
