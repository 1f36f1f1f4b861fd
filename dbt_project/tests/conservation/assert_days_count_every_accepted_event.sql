-- Per date, fct_campaign_day counts the events that the ledger accepted. A null date is an event without a time.
{{ config(severity='error') }}

with

days as (

    select
        event_date,
        sum(impressions + clicks + invalid_impressions + invalid_clicks) as counted
    from {{ ref('fct_campaign_day') }}
    group by event_date

),

accounting as (

    select
        cast(event_hour as date) as event_date,
        sum(accepted) as accepted
    from {{ ref('fct_event_accounting') }}
    group by cast(event_hour as date)

)

select
    accounting.event_date as accounting_date,
    days.event_date as days_date,
    accounting.accepted,
    days.counted
from accounting
full outer join days on accounting.event_date = days.event_date
where coalesce(accounting.accepted, 0) <> coalesce(days.counted, 0)
