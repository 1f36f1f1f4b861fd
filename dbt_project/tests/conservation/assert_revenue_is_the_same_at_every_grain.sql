-- Per model, window and currency the credits sum to the same money dated by touch, dated by order, and undated.
{{ config(severity='error') }}

with

credits as (

    select
        model,
        window_days,
        currency,
        sum(credit_micros) as credit_micros
    from {{ ref('fct_attribution_credits') }}
    group by model, window_days, currency

),

days as (

    select
        model,
        window_days,
        currency,
        sum(revenue_by_touch_date_micros) as by_touch_micros,
        sum(revenue_by_order_date_micros) as by_order_micros
    from {{ ref('fct_advertiser_attribution') }}
    group by model, window_days, currency

)

select
    credits.*,
    days.by_touch_micros,
    days.by_order_micros
from credits
full outer join days
    on
        credits.model = days.model
        and credits.window_days = days.window_days
        and credits.currency = days.currency
where
    credits.credit_micros is distinct from days.by_touch_micros
    or credits.credit_micros is distinct from days.by_order_micros
