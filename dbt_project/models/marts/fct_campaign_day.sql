with

increments as (

    select * from {{ ref('int_increments__completed') }}

),

summed as (

    select
        cast(event_minute as date) as event_date,
        campaign_id,
        store_id,
        currency,
        {{ sum_bigint('impressions') }} as impressions,
        {{ sum_bigint('clicks') }} as clicks,
        {{ sum_bigint('invalid_impressions') }} as invalid_impressions,
        {{ sum_bigint('invalid_clicks') }} as invalid_clicks,
        {{ sum_money('spend_nanos') }} as spend_nanos,
        {{ sum_money('invalid_spend_nanos') }} as invalid_spend_nanos
    from increments
    group by cast(event_minute as date), campaign_id, store_id, currency

),

final as (

    select
        event_date,
        campaign_id,
        store_id,
        currency,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        spend_nanos,
        {{ nanos_to_micros('spend_nanos') }} as spend_micros,
        {{ nanos_to_decimal('spend_nanos', 'currency') }} as spend,
        impressions + invalid_impressions as gross_impressions,
        clicks + invalid_clicks as gross_clicks,
        invalid_spend_nanos,
        {{ nanos_to_micros('invalid_spend_nanos') }} as invalid_spend_micros,
        {{ nanos_to_decimal('invalid_spend_nanos', 'currency') }} as invalid_spend,
        {{ nanos_to_micros('(spend_nanos + invalid_spend_nanos)') }} as gross_spend_micros,
        {{ nanos_to_decimal('(spend_nanos + invalid_spend_nanos)', 'currency') }} as gross_spend
    from summed

)

select * from final
