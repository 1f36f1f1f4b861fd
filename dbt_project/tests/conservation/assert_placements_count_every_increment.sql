-- Per day, region and currency fct_placement_day equals the increments, including those without a placement.
{{ config(severity='error') }}

with

measured as (

    select
        event_date,
        region,
        currency,
        gross_impressions as impressions,
        gross_clicks as clicks,
        spend_nanos,
        invalid_spend_nanos
    from {{ ref('fct_placement_day') }}
    union all
    select
        cast(event_minute as date) as event_date,
        region,
        currency,
        -(impressions + invalid_impressions) as impressions,
        -(clicks + invalid_clicks) as clicks,
        -spend_nanos as spend_nanos,
        -invalid_spend_nanos as invalid_spend_nanos
    from {{ ref('int_increments__completed') }}

)

select
    event_date,
    region,
    currency,
    sum(impressions) as impressions_too_many,
    sum(clicks) as clicks_too_many,
    sum(spend_nanos) as nanos_too_many,
    sum(invalid_spend_nanos) as invalid_nanos_too_many
from measured
group by event_date, region, currency
having sum(impressions) <> 0 or sum(clicks) <> 0 or sum(spend_nanos) <> 0 or sum(invalid_spend_nanos) <> 0
