with

restatements as (

    select * from {{ ref('stg_lakehouse__restatements') }}

),

late_events as (

    select * from {{ ref('int_late_events__summed') }}

),

increments as (

    select * from {{ ref('int_increments__completed') }}

),

billing_lines as (

    select * from {{ ref('stg_lakehouse__billing_lines') }}

),

changes as (

    select
        cast(event_hour as date) as event_date,
        campaign_id,
        currency,
        kind,
        cause,
        run_id,
        max(reason) as reason,
        max(rule_set) as rule_set,
        max(restated_at) as restated_at,
        {{ sum_bigint('impressions') }} as impressions,
        {{ sum_bigint('clicks') }} as clicks,
        {{ sum_bigint('invalid_impressions') }} as invalid_impressions,
        {{ sum_bigint('invalid_clicks') }} as invalid_clicks,
        {{ sum_money('spend_nanos') }} as spend_nanos,
        {{ sum_money('invalid_spend_nanos') }} as invalid_spend_nanos
    from restatements
    group by cast(event_hour as date), campaign_id, currency, kind, cause, run_id
    union all
    select
        event_date,
        campaign_id,
        currency,
        'late' as kind,
        'late_event' as cause,
        query_id || ':' || batch_id as run_id,
        'received after its hour had closed' as reason,
        null as rule_set,
        ingested_at as restated_at,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        spend_nanos,
        invalid_spend_nanos
    from late_events

),

totals as (

    select
        cast(event_minute as date) as event_date,
        campaign_id,
        currency,
        {{ sum_bigint('impressions') }} as impressions,
        {{ sum_bigint('clicks') }} as clicks,
        {{ sum_money('spend_nanos') }} as spend_nanos
    from increments
    group by cast(event_minute as date), campaign_id, currency

),

charged as (

    select
        event_date,
        campaign_id,
        currency,
        min(billed_at) as charged_at
    from billing_lines
    where line_type = 'charge'
    group by event_date, campaign_id, currency

),

-- After a change: the current value minus all later changes.
chained as (

    select
        changes.*,
        charged.charged_at,
        coalesce(totals.impressions, 0) - coalesce(sum(changes.impressions) over later, 0) as impressions_after,
        coalesce(totals.clicks, 0) - coalesce(sum(changes.clicks) over later, 0) as clicks_after,
        coalesce(totals.spend_nanos, 0) - coalesce(sum(changes.spend_nanos) over later, 0) as spend_nanos_after
    from changes
    left join totals
        on
            changes.event_date = totals.event_date
            and changes.campaign_id = totals.campaign_id
            and changes.currency = totals.currency
    left join charged
        on
            changes.event_date = charged.event_date
            and changes.campaign_id = charged.campaign_id
            and changes.currency = charged.currency
    window
        later as (
            partition by changes.event_date, changes.campaign_id, changes.currency
            order by changes.restated_at asc, changes.kind asc, changes.run_id asc, changes.cause asc
            rows between 1 following and unbounded following
        )

),

final as (

    select
        event_date,
        campaign_id,
        currency,
        kind,
        cause,
        run_id,
        reason,
        rule_set,
        restated_at,
        coalesce(restated_at > charged_at, false) as is_after_billing,
        impressions,
        clicks,
        invalid_impressions,
        invalid_clicks,
        spend_nanos,
        {{ nanos_to_decimal('spend_nanos', 'currency') }} as spend,
        invalid_spend_nanos,
        {{ nanos_to_decimal('invalid_spend_nanos', 'currency') }} as invalid_spend,
        cast(impressions_after - impressions as bigint) as impressions_before,
        cast(impressions_after as bigint) as impressions_after,
        cast(clicks_after - clicks as bigint) as clicks_before,
        cast(clicks_after as bigint) as clicks_after,
        {{ nanos_to_micros('(spend_nanos_after - spend_nanos)') }} as spend_micros_before,
        {{ nanos_to_decimal('(spend_nanos_after - spend_nanos)', 'currency') }} as spend_before,
        {{ nanos_to_micros('spend_nanos_after') }} as spend_micros_after,
        {{ nanos_to_decimal('spend_nanos_after', 'currency') }} as spend_after
    from chained

)

select * from final
