-- Per batch, hour and region the increments count each accepted event once, and their spend is the ledger's.
{{ config(severity='error') }}

with

ledger as (

    select
        query_id,
        batch_id,
        region,
        event_hour,
        sum(accepted) as accepted,
        sum(invalid_traffic) as invalid_traffic,
        sum(spend_nanos) as spend_nanos
    from {{ ref('stg_lakehouse__batch_ledger') }}
    where stream = 'events'
    group by query_id, batch_id, region, event_hour
    having sum(accepted) <> 0 or sum(invalid_traffic) <> 0 or sum(spend_nanos) <> 0

),

increments as (

    select
        query_id,
        batch_id,
        region,
        date_trunc('hour', event_minute) as event_hour,
        sum(impressions + clicks + invalid_impressions + invalid_clicks) as accepted,
        sum(invalid_impressions + invalid_clicks) as invalid_traffic,
        sum(spend_nanos) as spend_nanos
    from {{ ref('int_increments__completed') }}
    group by query_id, batch_id, region, date_trunc('hour', event_minute)
    -- compensated to nothing: as if it were not there
    having
        sum(impressions + clicks + invalid_impressions + invalid_clicks) <> 0
        or sum(invalid_impressions + invalid_clicks) <> 0
        or sum(spend_nanos) <> 0

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
