with

increments as (

    select * from {{ ref('int_increments__completed') }}

),

attribution as (

    select *
    from {{ ref('fct_advertiser_attribution') }}
    where
        model = '{{ var("attribution_model") }}'
        and window_days = {{ var("attribution_window_days") }}

),

delivery as (

    select
        cast(event_minute as date) as event_date,
        store_id,
        campaign_id,
        currency,
        {{ sum_bigint('impressions') }} as impressions,
        {{ sum_bigint('clicks') }} as clicks,
        {{ sum_bigint('invalid_impressions') }} as invalid_impressions,
        {{ sum_bigint('invalid_clicks') }} as invalid_clicks,
        {{ sum_money('spend_nanos') }} as spend_nanos,
        {{ sum_money('invalid_spend_nanos') }} as invalid_spend_nanos
    from increments
    group by cast(event_minute as date), store_id, campaign_id, currency

),

-- Spend and revenue in one currency share a row. In two currencies they have two rows, which are never combined.
joined as (

    select
        coalesce(delivery.event_date, attribution.event_date) as event_date,
        coalesce(delivery.store_id, attribution.store_id) as store_id,
        coalesce(delivery.campaign_id, attribution.campaign_id) as campaign_id,
        coalesce(delivery.currency, attribution.currency) as currency,
        coalesce(delivery.impressions, 0) as impressions,
        coalesce(delivery.clicks, 0) as clicks,
        coalesce(delivery.invalid_impressions, 0) as invalid_impressions,
        coalesce(delivery.invalid_clicks, 0) as invalid_clicks,
        coalesce(delivery.spend_nanos, 0) as spend_nanos,
        coalesce(delivery.invalid_spend_nanos, 0) as invalid_spend_nanos,
        coalesce(attribution.orders_by_touch_date, 0) as orders_by_touch_date,
        coalesce(attribution.revenue_by_touch_date_micros, 0) as revenue_by_touch_date_micros,
        coalesce(attribution.orders_by_order_date, 0) as orders_by_order_date,
        coalesce(attribution.revenue_by_order_date_micros, 0) as revenue_by_order_date_micros
    from delivery
    full outer join attribution
        on
            delivery.event_date = attribution.event_date
            and delivery.store_id = attribution.store_id
            and delivery.campaign_id = attribution.campaign_id
            and delivery.currency = attribution.currency

),

final as (

    select
        event_date,
        store_id,
        campaign_id,
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
        {{ nanos_to_decimal('(spend_nanos + invalid_spend_nanos)', 'currency') }} as gross_spend,
        cast(clicks / nullif(impressions, 0) as double) as ctr,
        {{ rounded_ratio('spend_nanos', '(1000 * clicks)') }} as cpc_micros,
        {{ rounded_ratio('spend_nanos', 'impressions') }} as cpm_micros,
        cast(orders_by_touch_date as double) as orders_by_touch_date,
        revenue_by_touch_date_micros,
        {{ micros_to_decimal('revenue_by_touch_date_micros', 'currency') }} as revenue_by_touch_date,
        cast(orders_by_order_date as double) as orders_by_order_date,
        revenue_by_order_date_micros,
        {{ micros_to_decimal('revenue_by_order_date_micros', 'currency') }} as revenue_by_order_date,
        cast(1000 * revenue_by_touch_date_micros / nullif(cast(spend_nanos as double), 0) as double) as roas,
        cast(
            1000 * revenue_by_order_date_micros / nullif(cast(spend_nanos as double), 0) as double
        ) as roas_by_order_date
    from joined

)

select * from final
