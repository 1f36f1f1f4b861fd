with

priced as (

    select * from {{ ref('int_campaigns__current') }}

),

ads as (

    select * from {{ ref('int_ads__seen') }}

),

names as (

    select * from {{ ref('stg_lakehouse__names') }}

),

seen as (

    select
        campaign_id,
        min(first_seen_minute) as first_seen_minute,
        max(last_seen_minute) as last_seen_minute
    from ads
    group by campaign_id

),

-- If no row names the campaign's store: the store that its newest event names.
last_store as (

    select
        campaign_id,
        store_id
    from ads
    qualify row_number() over (partition by campaign_id order by last_seen_minute desc, store_id asc) = 1

),

campaign_ids as (

    select campaign_id from priced
    union distinct
    select campaign_id from seen

),

final as (

    select
        campaign_ids.campaign_id,
        coalesce(names.name, campaign_ids.campaign_id) as campaign_name,
        coalesce(priced.store_id, last_store.store_id) as store_id,
        priced.billing_model,
        priced.daily_budget_micros,
        {{ micros_to_decimal('priced.daily_budget_micros', 'priced.currency') }} as daily_budget,
        priced.currency,
        priced.valid_from,
        priced.valid_to,
        coalesce(priced.is_current, false) as is_current,
        priced.campaign_id is not null as is_priced,
        seen.first_seen_minute,
        seen.last_seen_minute
    from campaign_ids
    left join priced on campaign_ids.campaign_id = priced.campaign_id
    left join seen on campaign_ids.campaign_id = seen.campaign_id
    left join last_store on campaign_ids.campaign_id = last_store.campaign_id
    left join names
        on
            campaign_ids.campaign_id = names.id
            and names.kind = 'campaign'

)

select * from final
