with

source as (

    select * from {{ source('lakehouse', 'billing_lines') }}

),

renamed as (

    select
        line_id,
        line_type,
        event_date,
        campaign_id,
        store_id,
        currency,
        cast(amount_micros as hugeint) as amount_micros,
        cast(billed_micros as hugeint) as billed_micros,
        cast(spend_nanos as hugeint) as spend_nanos,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        cast(invalid_spend_nanos as hugeint) as invalid_spend_nanos,
        reason,
        run_id,
        rule_set,
        metrics_version,
        posting,
        {{ utc_timestamp('billed_at') }} as billed_at
    from source

)

select * from renamed
