with

orders as (

    select *
    from {{ ref('int_orders__attributed') }}
    where touch_event_id is not null

),

-- Each model has a list over the windows. First unnest the models, then the windows.
by_model as (

    select
        *,
        unnest(['last_click', 'first_click', 'linear', 'position_based', 'time_decay']) as model,
        unnest([
            last_click_weights, first_click_weights, linear_weights, position_based_weights, time_decay_weights
        ]) as weights,
        unnest([
            last_click_micros, first_click_micros, linear_micros, position_based_micros, time_decay_micros
        ]) as micros
    from orders

),

by_window as (

    select
        *,
        unnest(window_days) as days,
        unnest(weights) as credit_weight,
        unnest(micros) as credit_micros
    from by_model

),

final as (

    select
        order_id,
        model,
        days as window_days,
        campaign_id,
        ad_id,
        store_id,
        user_id,
        touch_event_id,
        touch_type,
        touch_time,
        cast(touch_time as date) as touch_date,
        order_time,
        cast(order_time as date) as order_date,
        credit_weight,
        credit_micros,
        {{ micros_to_decimal('credit_micros', 'currency') }} as credit,
        currency,
        revision,
        rule_set
    from by_window
    where credit_weight > 0

)

select * from final
