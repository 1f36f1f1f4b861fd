with

ledger as (

    select * from {{ ref('stg_lakehouse__batch_ledger') }}

),

final as (

    select
        event_hour,
        region,
        {{ sum_bigint('offered') }} as offered,
        {{ sum_bigint('accepted') }} as accepted,
        {{ sum_bigint('duplicate') }} as duplicate,
        {{ sum_bigint('conflict') }} as conflict,
        {{ sum_bigint('rejected') }} as rejected,
        {{ sum_bigint('late') }} as late,
        {{ sum_bigint('invalid_traffic') }} as invalid_traffic,
        {{ sum_bigint('unpriced') }} as unpriced
    from ledger
    where stream = 'events'
    group by event_hour, region

)

select * from final
