with

source as (

    select * from {{ source('lakehouse', 'minute_metrics') }}

),

renamed as (

    select
        record_uuid,
        _query_id as query_id,
        _batch_id as batch_id,
        _run_id as run_id,
        {{ utc_timestamp('event_minute') }} as event_minute,
        event_date,
        region,
        campaign_id,
        ad_id,
        store_id,
        placement,
        currency,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        cast(spend_nanos as hugeint) as spend_nanos,
        cast(coalesce(invalid_spend_nanos, 0) as hugeint) as invalid_spend_nanos
    from source

)

select * from renamed
