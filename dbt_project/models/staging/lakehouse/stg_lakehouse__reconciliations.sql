with

source as (

    select * from {{ source('lakehouse', 'reconciliations') }}

),

renamed as (

    select
        run_id,
        {{ utc_timestamp('run_at') }} as run_at,
        {{ utc_timestamp('event_hour') }} as event_hour,
        layer,
        cause,
        campaign_id,
        rows_different,
        rows_expected,
        rows_found,
        cast(nanos_expected as hugeint) as nanos_expected,
        cast(nanos_found as hugeint) as nanos_found,
        is_repaired,
        detail
    from source

)

select * from renamed
