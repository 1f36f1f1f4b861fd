-- Per day and currency fct_advertiser_performance has the money of the increments and of the credits, all of it.
{{ config(severity='error') }}

with

measured as (

    select
        'performance' as side,
        event_date,
        currency,
        spend_nanos,
        gross_impressions + gross_clicks as events,
        revenue_by_touch_date_micros as revenue_micros
    from {{ ref('fct_advertiser_performance') }}
    union all
    select
        'sources' as side,
        cast(event_minute as date) as event_date,
        currency,
        spend_nanos,
        impressions + clicks + invalid_impressions + invalid_clicks as events,
        0 as revenue_micros
    from {{ ref('int_increments__completed') }}
    union all
    select
        'sources' as side,
        touch_date as event_date,
        currency,
        0 as spend_nanos,
        0 as events,
        credit_micros as revenue_micros
    from {{ ref('fct_attribution_credits') }}
    where
        model = '{{ var("attribution_model") }}'
        and window_days = {{ var("attribution_window_days") }}
        and {{ is_built_day('touch_date') }}

)

select
    event_date,
    currency,
    sum(case when side = 'sources' then spend_nanos else -spend_nanos end) as nanos_missing,
    sum(case when side = 'sources' then events else -events end) as events_missing,
    sum(case when side = 'sources' then revenue_micros else -revenue_micros end) as revenue_missing
from measured
group by event_date, currency
having
    sum(case when side = 'sources' then spend_nanos else -spend_nanos end) <> 0
    or sum(case when side = 'sources' then events else -events end) <> 0
    or sum(case when side = 'sources' then revenue_micros else -revenue_micros end) <> 0
