with

lines as (

    select * from {{ ref('stg_lakehouse__billing_lines') }}

),

days as (

    select * from {{ ref('fct_campaign_day') }}

),

billed as (

    select
        event_date,
        campaign_id,
        store_id,
        currency,
        {{ sum_money('amount_micros') }} as billed_micros
    from lines
    group by event_date, campaign_id, store_id, currency

),

-- What is not billed at this build: open days, and changes since the last billing run.
accruals as (

    select
        coalesce(days.event_date, billed.event_date) as event_date,
        coalesce(days.campaign_id, billed.campaign_id) as campaign_id,
        coalesce(days.store_id, billed.store_id) as store_id,
        coalesce(days.currency, billed.currency) as currency,
        coalesce(days.spend_micros, 0) as spend_micros,
        coalesce(days.spend_micros, 0) - coalesce(billed.billed_micros, 0) as amount_micros,
        coalesce(days.spend_nanos, 0) as spend_nanos
    from days
    full outer join billed
        on
            days.event_date = billed.event_date
            and days.campaign_id = billed.campaign_id
            and days.store_id = billed.store_id
            and days.currency = billed.currency

),

all_lines as (

    select
        line_id,
        line_type,
        event_date,
        campaign_id,
        store_id,
        currency,
        amount_micros,
        billed_micros,
        spend_nanos,
        true as is_posted,
        reason,
        run_id,
        rule_set,
        metrics_version,
        posting,
        billed_at
    from lines
    union all
    select
        'accrual-' || md5(concat_ws(chr(31), event_date, campaign_id, store_id, currency)) as line_id,
        'accrual' as line_type,
        event_date,
        campaign_id,
        store_id,
        currency,
        amount_micros,
        spend_micros as billed_micros,
        spend_nanos,
        false as is_posted,
        'not_billed_yet' as reason,
        null as run_id,
        null as rule_set,
        null as metrics_version,
        null as posting,
        null as billed_at
    from accruals
    where amount_micros <> 0

),

final as (

    select
        line_id,
        line_type,
        event_date,
        campaign_id,
        store_id,
        currency,
        amount_micros,
        {{ micros_to_decimal('amount_micros', 'currency') }} as amount,
        billed_micros,
        {{ micros_to_decimal('billed_micros', 'currency') }} as billed,
        spend_nanos,
        is_posted,
        reason,
        run_id,
        rule_set,
        metrics_version,
        posting,
        billed_at
    from all_lines

)

select * from final
