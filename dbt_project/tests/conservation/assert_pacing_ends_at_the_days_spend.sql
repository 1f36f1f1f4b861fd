-- The spend by the last minute of a day equals the sum of the increments of the campaign and currency.
{{ config(severity='error') }}

with

pacing as (

    select
        event_date,
        campaign_id,
        currency,
        max_by(spent_micros, event_minute) as spent_micros
    from {{ ref('fct_budget_pacing') }}
    group by event_date, campaign_id, currency

),

increments as (

    select
        cast(event_minute as date) as event_date,
        campaign_id,
        currency,
        sum(spend_nanos) as spend_nanos
    from {{ ref('int_increments__completed') }}
    group by cast(event_minute as date), campaign_id, currency

)

select
    increments.*,
    pacing.spent_micros
from increments
left join pacing
    on
        increments.event_date = pacing.event_date
        and increments.campaign_id = pacing.campaign_id
        and increments.currency = pacing.currency
where coalesce(pacing.spent_micros, 0) <> {{ nanos_to_micros('increments.spend_nanos') }}
