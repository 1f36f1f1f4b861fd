with

increments as (

    select * from {{ ref('int_increments__completed') }}

),

final as (

    select
        campaign_id,
        ad_id,
        store_id,
        min(event_minute) as first_seen_minute,
        max(event_minute) as last_seen_minute
    from increments
    group by campaign_id, ad_id, store_id

)

select * from final
