with

increments as (

    select * from {{ ref('int_increments__completed') }}

),

final as (

    select
        cast(event_minute as date) as event_date,
        event_minute,
        campaign_id,
        currency,
        {{ sum_money('spend_nanos') }} as spend_nanos
    from increments
    group by event_minute, campaign_id, currency
    having sum(spend_nanos) <> 0

)

select * from final
