with

revisions as (

    select * from {{ ref('stg_lakehouse__attributed_orders') }}

),

latest as (

    select
        order_id,
        max(revision) as revision
    from revisions
    group by order_id

),

final as (

    select revisions.*
    from revisions
    inner join latest
        on
            revisions.order_id = latest.order_id
            and revisions.revision = latest.revision

)

select * from final
