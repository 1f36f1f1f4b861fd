-- Per day, campaign, store and currency, lines and accruals sum to the spend, rounded once.
{{ config(severity='error') }}

with

ledger as (

    select
        event_date,
        campaign_id,
        store_id,
        currency,
        sum(amount_micros) as billed_micros
    from {{ ref('fct_billing_ledger') }}
    group by event_date, campaign_id, store_id, currency

),

days as (

    select * from {{ ref('fct_campaign_day') }}

)

select
    coalesce(days.event_date, ledger.event_date) as event_date,
    coalesce(days.campaign_id, ledger.campaign_id) as campaign_id,
    coalesce(days.store_id, ledger.store_id) as store_id,
    coalesce(days.currency, ledger.currency) as currency,
    days.spend_micros,
    ledger.billed_micros
from days
full outer join ledger
    on
        days.event_date = ledger.event_date
        and days.campaign_id = ledger.campaign_id
        and days.store_id = ledger.store_id
        and days.currency = ledger.currency
where coalesce(days.spend_micros, 0) <> coalesce(ledger.billed_micros, 0)
