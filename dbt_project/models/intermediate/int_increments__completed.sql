with

increments as (

    select * from {{ ref('stg_lakehouse__minute_metrics') }}

),

completed_batches as (

    select distinct
        query_id,
        batch_id
    from {{ ref('stg_lakehouse__batch_ledger') }}

),

final as (

    select increments.*
    from increments
    inner join completed_batches
        on
            increments.query_id = completed_batches.query_id
            and increments.batch_id = completed_batches.batch_id

)

select * from final
