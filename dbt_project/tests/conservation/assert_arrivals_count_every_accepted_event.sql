-- Per hour and region fct_late_arrivals has the accepted and late events of the ledger. A warning: the events
-- themselves are held against the ledger by `adtally status` and the recount, and no money is made from these.
{{ config(severity='warn') }}

with

ledger as (

    select
        event_hour,
        region,
        sum(accepted) as events,
        sum(late) as late
    from {{ ref('stg_lakehouse__batch_ledger') }}
    where stream = 'events'
    group by event_hour, region
    having sum(accepted) <> 0

),

arrivals as (

    select
        event_hour,
        region,
        events,
        late
    from {{ ref('fct_late_arrivals') }}

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
        and ledger.region = arrivals.region
where
    ledger.events is distinct from arrivals.events
    or ledger.late is distinct from arrivals.late
