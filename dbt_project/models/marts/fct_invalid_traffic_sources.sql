with

events as (

    select * from {{ ref('int_events__completed') }}

),

-- One row per invalid event and type of source.
sourced as (

    select
        event_date,
        invalid_traffic_rule as rule,
        currency,
        campaign_id,
        event_type,
        invalid_spend_nanos,
        unnest(['user', 'user_agent']) as source_type,
        unnest([user_id, user_agent]) as source
    from events
    where is_invalid

),

summed as (

    select
        event_date,
        source_type,
        source,
        rule,
        currency,
        count(distinct campaign_id) as campaigns,
        count(*) filter (where event_type = 'impression') as invalid_impressions,
        count(*) filter (where event_type = 'click') as invalid_clicks,
        {{ sum_money('invalid_spend_nanos') }} as invalid_spend_nanos
    from sourced
    group by event_date, source_type, source, rule, currency

),

final as (

    select
        event_date,
        source_type,
        source,
        rule,
        currency,
        campaigns,
        invalid_impressions,
        invalid_clicks,
        invalid_spend_nanos,
        {{ nanos_to_micros('invalid_spend_nanos') }} as invalid_spend_micros,
        {{ nanos_to_decimal('invalid_spend_nanos', 'currency') }} as invalid_spend
    from summed

)

select * from final
