with

increments as (

    select * from {{ ref('int_increments__completed') }}

),

final as (

    select
        cast(event_minute as date) as event_date,
        campaign_id,
        ad_id,
        store_id,
        min(event_minute) as first_seen_minute,
        max(event_minute) as last_seen_minute
    from increments
    group by cast(event_minute as date), campaign_id, ad_id, store_id

)

select * from final
