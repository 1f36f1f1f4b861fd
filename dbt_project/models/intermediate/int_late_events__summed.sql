with

events as (

    select * from {{ ref('stg_lakehouse__events') }}

),

batches as (

    select * from {{ ref('int_batches__completed') }}

),

-- What a late event counted as when it arrived. A correction that marked it later is a separate restatement.
arrived as (

    select
        *,
        cast(event_time as date) as event_date,
        invalid_traffic_rule is not null and run_id is null as was_invalid
    from events
    where is_late

),

final as (

    select
        arrived.event_date,
        arrived.campaign_id,
        arrived.currency,
        arrived.query_id,
        arrived.batch_id,
        max(batches.ingested_at) as ingested_at,
        count(*) filter (where arrived.event_type = 'impression' and not arrived.was_invalid) as impressions,
        count(*) filter (where arrived.event_type = 'click' and not arrived.was_invalid) as clicks,
        count(*) filter (where arrived.event_type = 'impression' and arrived.was_invalid) as invalid_impressions,
        count(*) filter (where arrived.event_type = 'click' and arrived.was_invalid) as invalid_clicks,
        cast(
            sum(
                case
                    when arrived.was_invalid then 0
                    when arrived.run_id is null then arrived.spend_nanos
                    else arrived.spend_nanos + arrived.invalid_spend_nanos
                end
            ) as hugeint
        ) as spend_nanos,
        cast(
            sum(case when arrived.was_invalid then arrived.invalid_spend_nanos else 0 end) as hugeint
        ) as invalid_spend_nanos
    from arrived
    inner join batches
        on
            arrived.query_id = batches.query_id
            and arrived.batch_id = batches.batch_id
    group by arrived.event_date, arrived.campaign_id, arrived.currency, arrived.query_id, arrived.batch_id

)

select * from final
