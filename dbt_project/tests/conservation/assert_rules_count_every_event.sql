-- Per day, campaign, ad, store, placement, region and currency the rules of fct_invalid_traffic_day, 'none' included,
-- sum to the increments: counts and nanos, net and invalid.
{{ config(severity='error') }}

with

measured as (

    select
        event_date,
        campaign_id,
        ad_id,
        store_id,
        placement,
        region,
        currency,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        spend_nanos,
        invalid_spend_nanos
    from {{ ref('fct_invalid_traffic_day') }}
    union all
    select
        cast(event_minute as date) as event_date,
        campaign_id,
        ad_id,
        store_id,
        placement,
        region,
        currency,
        -impressions as impressions,
        -clicks as clicks,
        -invalid_impressions as invalid_impressions,
        -invalid_clicks as invalid_clicks,
        -spend_nanos as spend_nanos,
        -invalid_spend_nanos as invalid_spend_nanos
    from {{ ref('int_increments__completed') }}

)

select
    event_date,
    campaign_id,
    ad_id,
    store_id,
    placement,
    region,
    currency,
    sum(impressions) as impressions_too_many,
    sum(clicks) as clicks_too_many,
    sum(invalid_impressions) as invalid_impressions_too_many,
    sum(invalid_clicks) as invalid_clicks_too_many,
    sum(spend_nanos) as nanos_too_many,
    sum(invalid_spend_nanos) as invalid_nanos_too_many
from measured
group by event_date, campaign_id, ad_id, store_id, placement, region, currency
having
    sum(impressions) <> 0
    or sum(clicks) <> 0
    or sum(invalid_impressions) <> 0
    or sum(invalid_clicks) <> 0
    or sum(spend_nanos) <> 0
    or sum(invalid_spend_nanos) <> 0
