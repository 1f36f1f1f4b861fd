-- Per date and currency: the nanos of the increments, the minutes, the days. Currencies are never added.
{{ config(severity='error') }}

with

measured as (

    select
        'increments' as grain,
        cast(event_minute as date) as event_date,
        currency,
        spend_nanos,
        invalid_spend_nanos
    from {{ ref('int_increments__completed') }}
    union all
    select
        'minutes' as grain,
        event_date,
        currency,
        spend_nanos,
        invalid_spend_nanos
    from {{ ref('fct_campaign_minute') }}
    union all
    select
        'days' as grain,
        event_date,
        currency,
        spend_nanos,
        invalid_spend_nanos
    from {{ ref('fct_campaign_day') }}

),

compared as (

    select
        event_date,
        currency,
        sum(spend_nanos) filter (where grain = 'increments') as increments_nanos,
        sum(invalid_spend_nanos) filter (where grain = 'increments') as increments_invalid_nanos,
        sum(spend_nanos) filter (where grain = 'minutes') as minutes_nanos,
        sum(invalid_spend_nanos) filter (where grain = 'minutes') as minutes_invalid_nanos,
        sum(spend_nanos) filter (where grain = 'days') as days_nanos,
        sum(invalid_spend_nanos) filter (where grain = 'days') as days_invalid_nanos
    from measured
    group by event_date, currency

)

select *
from compared
where
    increments_nanos is distinct from minutes_nanos
    or increments_nanos is distinct from days_nanos
    or increments_invalid_nanos is distinct from minutes_invalid_nanos
    or increments_invalid_nanos is distinct from days_invalid_nanos
