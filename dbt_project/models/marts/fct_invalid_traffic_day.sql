with

events as (

    select * from {{ ref('int_events__completed') }}

),

-- Events that no rule marked have the rule 'none'. So the rows of a key sum to its gross figures.
summed as (

    select
        event_date,
        campaign_id,
        ad_id,
        store_id,
        placement,
        region,
        coalesce(invalid_traffic_rule, 'none') as rule,
        currency,
        count(*) filter (where event_type = 'impression' and not is_invalid) as impressions,
        count(*) filter (where event_type = 'click' and not is_invalid) as clicks,
        count(*) filter (where event_type = 'impression' and is_invalid) as invalid_impressions,
        count(*) filter (where event_type = 'click' and is_invalid) as invalid_clicks,
        {{ sum_money('spend_nanos') }} as spend_nanos,
        {{ sum_money('invalid_spend_nanos') }} as invalid_spend_nanos
    from events
    group by
        event_date, campaign_id, ad_id, store_id, placement, region, coalesce(invalid_traffic_rule, 'none'), currency

),

final as (

    select
        event_date,
        campaign_id,
        ad_id,
        store_id,
        placement,
        region,
        rule,
        currency,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        impressions + invalid_impressions as gross_impressions,
        clicks + invalid_clicks as gross_clicks,
        spend_nanos,
        {{ nanos_to_micros('spend_nanos') }} as spend_micros,
        {{ nanos_to_decimal('spend_nanos', 'currency') }} as spend,
        invalid_spend_nanos,
        {{ nanos_to_micros('invalid_spend_nanos') }} as invalid_spend_micros,
        {{ nanos_to_decimal('invalid_spend_nanos', 'currency') }} as invalid_spend,
        {{ nanos_to_micros('(spend_nanos + invalid_spend_nanos)') }} as gross_spend_micros,
        {{ nanos_to_decimal('(spend_nanos + invalid_spend_nanos)', 'currency') }} as gross_spend
    from summed

)

select * from final
