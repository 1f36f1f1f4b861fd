with

source as (

    select * from {{ source('lakehouse', 'events') }}

),

renamed as (

    select
        event_id,
        event_type,
        {{ utc_timestamp('event_time') }} as event_time,
        {{ utc_timestamp('received_at') }} as received_at,
        region,
        campaign_id,
        ad_id,
        store_id,
        user_id,
        placement,
        user_agent,
        currency,
        coalesce(is_late, false) as is_late,
        invalid_traffic_rule,
        spend_nanos,
        coalesce(invalid_spend_nanos, 0) as invalid_spend_nanos,
        _query_id as query_id,
        _batch_id as batch_id,
        _run_id as run_id
    from source

)

select * from renamed
