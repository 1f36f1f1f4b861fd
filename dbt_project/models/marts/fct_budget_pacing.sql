with

minutes as (

    select * from {{ ref('int_spend__by_minute') }}

),

curves as (

    select * from {{ ref('int_spend__curves') }}

),

campaigns as (

    select * from {{ ref('stg_lakehouse__campaigns') }}

),

increments as (

    select * from {{ ref('int_increments__completed') }}

),

batches as (

    select * from {{ ref('int_batches__completed') }}

),

spent as (

    select
        event_date,
        event_minute,
        event_minute + interval 1 minute as minute_end,
        campaign_id,
        currency,
        hour(event_minute) as hour_of_day,
        60 * hour(event_minute) + minute(event_minute) + 1 as minutes_passed,
        sum(spend_nanos) over (
            partition by event_date, campaign_id, currency order by event_minute asc
        ) as spent_nanos
    from minutes

),

-- The budget in force at the end of the minute, in the same currency. Other currencies cannot be compared.
budgeted as (

    select
        spent.*,
        case
            when campaigns.valid_to is null or campaigns.valid_to > spent.event_minute
                then campaigns.daily_budget_micros
        end as daily_budget_micros
    from spent
    asof left join campaigns
        on
            spent.campaign_id = campaigns.campaign_id
            and spent.currency = campaigns.currency
            and spent.minute_end > campaigns.valid_from

),

expected as (

    select
        budgeted.*,
        coalesce(curves.history_days, 0) as history_days,
        case
            when curves.history_days > 0
                then
                    curves.share_at_start
                    + (curves.share_at_end - curves.share_at_start) * (minute(budgeted.event_minute) + 1) / 60
            else budgeted.minutes_passed / 1440
        end as expected_share,
        case
            when budgeted.daily_budget_micros is not null
                then greatest(0, budgeted.spent_nanos - 1000 * cast(budgeted.daily_budget_micros as hugeint))
        end as overspend_nanos
    from budgeted
    left join curves
        on
            budgeted.campaign_id = curves.campaign_id
            and budgeted.currency = curves.currency
            and budgeted.event_date = curves.event_date
            and budgeted.hour_of_day = curves.hour_of_day

),

overspent as (

    select
        event_date,
        campaign_id,
        currency,
        max_by(daily_budget_micros, event_minute) as daily_budget_micros
    from expected
    group by event_date, campaign_id, currency
    having max(overspend_nanos) > 0

),

ingested as (

    select
        overspent.event_date,
        overspent.campaign_id,
        overspent.currency,
        overspent.daily_budget_micros,
        batches.ingested_at,
        sum(increments.spend_nanos) as spend_nanos
    from overspent
    inner join increments
        on
            overspent.event_date = cast(increments.event_minute as date)
            and overspent.campaign_id = increments.campaign_id
            and overspent.currency = increments.currency
    inner join batches
        on
            increments.query_id = batches.query_id
            and increments.batch_id = batches.batch_id
    -- what was found invalid later was spend as far as anybody knew then
    where increments.run_id is null
    group by
        overspent.event_date,
        overspent.campaign_id,
        overspent.currency,
        overspent.daily_budget_micros,
        batches.ingested_at

),

counted as (

    select
        *,
        sum(spend_nanos) over (
            partition by event_date, campaign_id, currency order by ingested_at asc
        ) as known_nanos
    from ingested

),

-- When the ingested spend reached the budget. From then on delivery could have stopped.
known as (

    select
        event_date,
        campaign_id,
        currency,
        min(ingested_at) as budget_known_at
    from counted
    where known_nanos >= 1000 * cast(daily_budget_micros as hugeint)
    group by event_date, campaign_id, currency

),

joined as (

    select
        expected.*,
        known.budget_known_at,
        max(
            case
                when known.budget_known_at is null or expected.event_minute <= known.budget_known_at
                    then expected.overspend_nanos
                else 0
            end
        ) over (
            partition by expected.event_date, expected.campaign_id, expected.currency order by expected.event_minute asc
        ) as unknown_nanos
    from expected
    left join known
        on
            expected.event_date = known.event_date
            and expected.campaign_id = known.campaign_id
            and expected.currency = known.currency

),

measured as (

    select
        event_date,
        event_minute,
        campaign_id,
        currency,
        daily_budget_micros,
        spent_nanos,
        overspend_nanos,
        least(overspend_nanos, unknown_nanos) as overspend_from_lag_nanos,
        cast(minutes_passed / 1440 as double) as day_share,
        history_days,
        cast(expected_share as double) as expected_share,
        cast(round(daily_budget_micros * expected_share) as hugeint) as expected_micros,
        -- where the curve has no spend yet, the clock has to do
        try_cast(
            round(spent_nanos / 1000 / coalesce(nullif(expected_share, 0), minutes_passed / 1440)) as hugeint
        ) as projected_micros,
        case when overspend_nanos > 0 then budget_known_at end as budget_known_at,
        coalesce(
            spent_nanos * 10 > 9000 * cast(daily_budget_micros as hugeint) and minutes_passed * 10 < 1440 * 8, false
        ) as is_alert
    from joined

),

final as (

    select
        event_date,
        event_minute,
        campaign_id,
        currency,
        daily_budget_micros,
        {{ micros_to_decimal('daily_budget_micros', 'currency') }} as daily_budget,
        {{ nanos_to_micros('spent_nanos') }} as spent_micros,
        {{ nanos_to_decimal('spent_nanos', 'currency') }} as spent,
        day_share,
        history_days,
        expected_share,
        expected_micros,
        {{ micros_to_decimal('expected_micros', 'currency') }} as expected,
        projected_micros,
        {{ micros_to_decimal('projected_micros', 'currency') }} as projected,
        {{ nanos_to_micros('overspend_nanos') }} as overspend_micros,
        {{ nanos_to_decimal('overspend_nanos', 'currency') }} as overspend,
        {{ nanos_to_micros('overspend_from_lag_nanos') }} as overspend_from_lag_micros,
        {{ nanos_to_decimal('overspend_from_lag_nanos', 'currency') }} as overspend_from_lag,
        budget_known_at,
        is_alert
    from measured

)

select * from final
