with

campaigns as (

    select * from {{ ref('dim_campaign') }}

),

ads as (

    select * from {{ ref('int_ads__seen') }}

),

names as (

    select * from {{ ref('stg_lakehouse__names') }}

),

owned as (

    select
        store_id,
        count(*) as campaigns
    from campaigns
    group by store_id

),

seen as (

    select
        store_id,
        min(first_seen_minute) as first_seen_minute,
        max(last_seen_minute) as last_seen_minute
    from ads
    group by store_id

),

store_ids as (

    select store_id from owned
    union distinct
    select store_id from seen

),

final as (

    select
        store_ids.store_id,
        coalesce(names.name, store_ids.store_id) as store_name,
        coalesce(owned.campaigns, 0) as campaigns,
        seen.first_seen_minute,
        seen.last_seen_minute
    from store_ids
    left join owned on store_ids.store_id = owned.store_id
    left join seen on store_ids.store_id = seen.store_id
    left join names
        on
            store_ids.store_id = names.id
            and names.kind = 'store'

)

select * from final
