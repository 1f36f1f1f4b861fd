with

credits as (

    select * from {{ ref('fct_attribution_credits') }}

),

dated as (

    select
        touch_date as event_date,
        store_id,
        campaign_id,
        currency,
        model,
        window_days,
        credit_weight as orders_by_touch_date,
        credit_micros as revenue_by_touch_date_micros,
        0 as orders_by_order_date,
        0 as revenue_by_order_date_micros
    from credits
    where {{ is_built_day('touch_date') }}
    union all
    select
        order_date as event_date,
        store_id,
        campaign_id,
        currency,
        model,
        window_days,
        0 as orders_by_touch_date,
        0 as revenue_by_touch_date_micros,
        credit_weight as orders_by_order_date,
        credit_micros as revenue_by_order_date_micros
    from credits
    where {{ is_built_day('order_date') }}

),

summed as (

    select
        event_date,
        store_id,
        campaign_id,
        currency,
        model,
        window_days,
        -- thirds do not add up to the last bit, and not in the same order each time
        round(sum(orders_by_touch_date), 9) as orders_by_touch_date,
        {{ sum_money('revenue_by_touch_date_micros') }} as revenue_by_touch_date_micros,
        round(sum(orders_by_order_date), 9) as orders_by_order_date,
        {{ sum_money('revenue_by_order_date_micros') }} as revenue_by_order_date_micros
    from dated
    group by event_date, store_id, campaign_id, currency, model, window_days

),

final as (

    select
        event_date,
        store_id,
        campaign_id,
        currency,
        model,
        window_days,
        orders_by_touch_date,
        revenue_by_touch_date_micros,
        {{ micros_to_decimal('revenue_by_touch_date_micros', 'currency') }} as revenue_by_touch_date,
        orders_by_order_date,
        revenue_by_order_date_micros,
        {{ micros_to_decimal('revenue_by_order_date_micros', 'currency') }} as revenue_by_order_date
    from summed

)

select * from final
