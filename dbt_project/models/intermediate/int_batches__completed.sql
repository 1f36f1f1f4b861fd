with

ledger as (

    select * from {{ ref('stg_lakehouse__batch_ledger') }}

),

final as (

    select
        query_id,
        batch_id,
        max(ingested_at) as ingested_at
    from ledger
    group by query_id, batch_id

)

select * from final
