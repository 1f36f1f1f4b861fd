with

source as (

    select * from {{ source('lakehouse', 'restatements') }}

),

renamed as (

    select
        run_id,
        kind,
        reason,
        cause,
        {{ utc_timestamp('event_hour') }} as event_hour,
        region,
        campaign_id,
        currency,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        cast(spend_nanos as hugeint) as spend_nanos,
        cast(coalesce(invalid_spend_nanos, 0) as hugeint) as invalid_spend_nanos,
        rule_set,
        {{ utc_timestamp('restated_at') }} as restated_at
    from source

)

select * from renamed
