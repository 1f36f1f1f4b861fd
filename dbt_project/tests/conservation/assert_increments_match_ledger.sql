-- Per batch, hour and region the increments count each accepted event once, and their spend is the ledger's. A batch
-- of a Kafka topic is counted under its cluster, while its records may name other regions, so it is compared whole.
{{ config(severity='error') }}

with

of_clusters as (

    select distinct
        query_id,
        batch_id,
        true as is_whole
    from {{ ref('stg_lakehouse__batch_ledger') }}
    where
        stream = 'events'
        and record_source = 'kafka'

),

ledger as (

    select
        booked.query_id,
        booked.batch_id,
        case when of_clusters.is_whole is null then booked.region end as region,
        booked.event_hour,
        sum(booked.accepted) as accepted,
        sum(booked.invalid_traffic) as invalid_traffic,
        sum(booked.spend_nanos) as spend_nanos
    from {{ ref('stg_lakehouse__batch_ledger') }} as booked
    left join of_clusters
        on
            booked.query_id = of_clusters.query_id
            and booked.batch_id = of_clusters.batch_id
    where booked.stream = 'events'
    group by all
    having sum(booked.accepted) <> 0 or sum(booked.invalid_traffic) <> 0 or sum(booked.spend_nanos) <> 0

),

increments as (

    select
        counted.query_id,
        counted.batch_id,
        case when of_clusters.is_whole is null then counted.region end as region,
        date_trunc('hour', counted.event_minute) as event_hour,
        sum(counted.impressions + counted.clicks + counted.invalid_impressions + counted.invalid_clicks) as accepted,
        sum(counted.invalid_impressions + counted.invalid_clicks) as invalid_traffic,
        sum(counted.spend_nanos) as spend_nanos
    from {{ ref('int_increments__completed') }} as counted
    left join of_clusters
        on
            counted.query_id = of_clusters.query_id
            and counted.batch_id = of_clusters.batch_id
    group by all
    -- compensated to nothing: as if it were not there
    having
        sum(counted.impressions + counted.clicks + counted.invalid_impressions + counted.invalid_clicks) <> 0
        or sum(counted.invalid_impressions + counted.invalid_clicks) <> 0
        or sum(counted.spend_nanos) <> 0

),

ledger_only as (

    select * from ledger
    except all
    select * from increments

),

increments_only as (

    select * from increments
    except all
    select * from ledger

)

select
    'ledger' as side,
    *
from ledger_only
union all
select
    'increments' as side,
    *
from increments_only
