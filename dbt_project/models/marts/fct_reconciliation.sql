with

findings as (

    select * from {{ ref('stg_lakehouse__reconciliations') }}

),

-- The newest run of an hour gives the hour's state.
ranked as (

    select
        *,
        dense_rank() over (partition by event_hour order by run_at desc, run_id desc) as recency
    from findings

),

final as (

    select
        run_id,
        run_at,
        event_hour,
        layer,
        cause,
        campaign_id,
        rows_different,
        rows_expected,
        rows_found,
        nanos_expected,
        nanos_found,
        {{ nanos_to_micros('cast(nanos_found as hugeint) - cast(nanos_expected as hugeint)') }} as micros_difference,
        is_repaired,
        recency = 1 as is_latest,
        detail
    from ranked

)

select * from final
