with

campaigns as (

    select * from {{ ref('stg_lakehouse__campaigns') }}

),

timed as (

    select
        *,
        {{ built_at() }} as built_at
    from campaigns

),

-- The range that started last. A campaign that has not started shows its first range.
ranked as (

    select
        *,
        row_number() over (
            partition by campaign_id
            order by
                valid_from > built_at asc,
                case when valid_from <= built_at then valid_from end desc,
                valid_from asc
        ) as recency
    from timed

),

final as (

    select
        campaign_id,
        store_id,
        billing_model,
        daily_budget_micros,
        currency,
        valid_from,
        valid_to,
        valid_from <= built_at and (valid_to is null or built_at < valid_to) as is_current
    from ranked
    where recency = 1

)

select * from final
