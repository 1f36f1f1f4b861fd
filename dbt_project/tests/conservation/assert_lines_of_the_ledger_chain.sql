-- The total of a key after a posting is the sum of its lines so far. Credits subtract, adjustments add, and a key is
-- charged once.
{{ config(severity='error') }}

with

lines as (

    select
        *,
        sum(amount_micros) over (
            partition by event_date, campaign_id, store_id, currency order by posting asc
        ) as summed_micros,
        count(*) filter (where line_type = 'charge') over (
            partition by event_date, campaign_id, store_id, currency
        ) as charges
    from {{ ref('stg_lakehouse__billing_lines') }}

),

postings as (

    select
        event_date,
        campaign_id,
        store_id,
        currency,
        posting,
        max(summed_micros) as summed_micros,
        max(charges) as charges,
        count(*) filter (where billed_micros = summed_micros) as closing_lines,
        count(*) filter (where line_type = 'credit' and amount_micros >= 0) as credits_that_add,
        count(*) filter (where line_type = 'adjustment' and amount_micros <= 0) as adjustments_that_take
    from lines
    group by event_date, campaign_id, store_id, currency, posting

)

select *
from postings
where charges > 1 or closing_lines = 0 or credits_that_add > 0 or adjustments_that_take > 0
