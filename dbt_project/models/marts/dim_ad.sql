with

ads as (

    select * from {{ ref('int_ads__seen') }}

),

names as (

    select * from {{ ref('stg_lakehouse__names') }}

),

spans as (

    select
        ad_id,
        min(first_seen_minute) as first_seen_minute,
        max(last_seen_minute) as last_seen_minute,
        count(distinct campaign_id) as campaigns_seen
    from ads
    group by ad_id

),

last_owner as (

    select
        ad_id,
        campaign_id,
        store_id
    from ads
    qualify row_number() over (
        partition by ad_id order by last_seen_minute desc, campaign_id asc, store_id asc
    ) = 1

),

final as (

    select
        spans.ad_id,
        coalesce(names.name, spans.ad_id) as ad_name,
        last_owner.campaign_id,
        last_owner.store_id,
        spans.first_seen_minute,
        spans.last_seen_minute,
        spans.campaigns_seen
    from spans
    inner join last_owner on spans.ad_id = last_owner.ad_id
    left join names
        on
            spans.ad_id = names.id
            and names.kind = 'ad'

)

select * from final
