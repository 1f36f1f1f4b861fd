-- Per order, model and window the weights sum to 1 and the micros to the order's total, exactly.
{{ config(severity='error') }}

with

credits as (

    select
        order_id,
        model,
        window_days,
        sum(credit_micros) as credit_micros,
        sum(credit_weight) as credit_weight
    from {{ ref('fct_attribution_credits') }}
    group by order_id, model, window_days

),

orders as (

    select
        order_id,
        any_value(total_micros) as total_micros
    from {{ ref('int_orders__attributed') }}
    group by order_id

)

select
    credits.*,
    orders.total_micros
from credits
inner join orders on credits.order_id = orders.order_id
where credits.credit_micros <> orders.total_micros or abs(credits.credit_weight - 1) > 1e-9
