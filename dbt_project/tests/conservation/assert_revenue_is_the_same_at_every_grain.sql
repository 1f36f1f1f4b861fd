-- Per model, window, currency and day the credits sum to the same money, dated by touch and dated by order.
{{ config(severity='error') }}

with

measured as (

    select
        model,
        window_days,
        currency,
        event_date,
        revenue_by_touch_date_micros as by_touch_micros,
        revenue_by_order_date_micros as by_order_micros
    from {{ ref('fct_advertiser_attribution') }}
    union all
    select
        model,
        window_days,
        currency,
        touch_date as event_date,
        -credit_micros as by_touch_micros,
        0 as by_order_micros
    from {{ ref('fct_attribution_credits') }}
    where {{ is_built_day('touch_date') }}
    union all
    select
        model,
        window_days,
        currency,
        order_date as event_date,
        0 as by_touch_micros,
        -credit_micros as by_order_micros
    from {{ ref('fct_attribution_credits') }}
    where {{ is_built_day('order_date') }}

)

select
    model,
    window_days,
    currency,
    event_date,
    sum(by_touch_micros) as micros_too_many_by_touch,
    sum(by_order_micros) as micros_too_many_by_order
from measured
group by model, window_days, currency, event_date
having sum(by_touch_micros) <> 0 or sum(by_order_micros) <> 0
