with

source as (

    select * from {{ source('lakehouse', 'batch_ledger') }}

),

renamed as (

    select
        _query_id as query_id,
        _batch_id as batch_id,
        _run_id as run_id,
        stream,
        source as record_source,
        region,
        {{ utc_timestamp('event_hour') }} as event_hour,
        offered,
        accepted,
        duplicate,
        conflict,
        rejected,
        late,
        invalid_traffic,
        unpriced,
        cast(spend_nanos as hugeint) as spend_nanos,
        {{ utc_timestamp('max_received_at') }} as max_received_at,
        {{ utc_timestamp('ingested_at') }} as ingested_at
    from source

)

select * from renamed
