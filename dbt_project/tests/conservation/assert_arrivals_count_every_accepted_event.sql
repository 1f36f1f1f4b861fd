-- Per hour and region fct_late_arrivals has the accepted and late events of the ledger. A warning: the events
-- themselves are compared with the ledger by `adtally status` and the recount, and no amount is computed from these.
-- With a Kafka topic, per hour only: the ledger has the topic's cluster, an event the region that it names.
{{ config(severity='warn') }}

with

booked as (

    select
        event_hour,
        case when not coalesce(bool_or(record_source = 'kafka') over (), false) then region end as region,
        accepted,
        late
    from {{ ref('stg_lakehouse__batch_ledger') }}
    where stream = 'events'

),

ledger as (

    select
        event_hour,
        region,
        sum(accepted) as events,
        sum(late) as late
    from booked
    group by event_hour, region
    having sum(accepted) <> 0

),

arrivals as (

    select
        event_hour,
        case when (select count(booked.region) from booked) > 0 then region end as region,
        sum(events) as events,
        sum(late) as late
    from {{ ref('fct_late_arrivals') }}
    group by all

)

select
    coalesce(ledger.event_hour, arrivals.event_hour) as event_hour,
    coalesce(ledger.region, arrivals.region) as region,
    ledger.events as ledger_events,
    arrivals.events,
    ledger.late as ledger_late,
    arrivals.late
from ledger
full outer join arrivals
    on
        ledger.event_hour = arrivals.event_hour
        and ledger.region is not distinct from arrivals.region
where
    ledger.events is distinct from arrivals.events
    or ledger.late is distinct from arrivals.late
