with

source as (

    select * from {{ source('lakehouse', 'attributed_orders') }}

),

renamed as (

    select
        order_id,
        revision,
        status,
        {{ utc_timestamp('order_time') }} as order_time,
        user_id,
        store_id,
        currency,
        total_micros,
        touch_event_id,
        touch_type,
        {{ utc_timestamp('touch_time') }} as touch_time,
        campaign_id,
        ad_id,
        window_days,
        last_click_micros,
        first_click_micros,
        linear_micros,
        position_based_micros,
        time_decay_micros,
        last_click_weights,
        first_click_weights,
        linear_weights,
        position_based_weights,
        time_decay_weights,
        reason,
        rule_set,
        {{ utc_timestamp('attributed_at') }} as attributed_at,
        _run_id as run_id
    from source

)

select * from renamed
