-- Per date and currency each type of source has every invalid event of the increments, once, and its money.
{{ config(severity='error') }}

with

source_types as (

    select unnest(['user', 'user_agent']) as source_type

),

measured as (

    select
        source_type,
        event_date,
        currency,
        invalid_impressions,
        invalid_clicks,
        invalid_spend_nanos
    from {{ ref('fct_invalid_traffic_sources') }}
    union all
    select
        source_types.source_type,
        cast(increments.event_minute as date) as event_date,
        increments.currency,
        -increments.invalid_impressions as invalid_impressions,
        -increments.invalid_clicks as invalid_clicks,
        -increments.invalid_spend_nanos as invalid_spend_nanos
    from {{ ref('int_increments__completed') }} as increments
    cross join source_types

)

select
    source_type,
    event_date,
    currency,
    sum(invalid_impressions) as impressions_too_many,
    sum(invalid_clicks) as clicks_too_many,
    sum(invalid_spend_nanos) as nanos_too_many
from measured
group by source_type, event_date, currency
having sum(invalid_impressions) <> 0 or sum(invalid_clicks) <> 0 or sum(invalid_spend_nanos) <> 0
