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
        amount_micros,
        billed_micros,
        spend_nanos,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        invalid_spend_nanos,
        reason,
        run_id,
        rule_set,
        metrics_version,
        posting,
        {{ utc_timestamp('billed_at') }} as billed_at
    from source

)

select * from renamed
