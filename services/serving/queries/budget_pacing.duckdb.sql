select
    event_minute,
    campaign_id,
    currency,
    spent_micros,
    coalesce(cast($daily_budget_micros as bigint), daily_budget_micros) as daily_budget_micros,
    cast(
        (2 * coalesce(cast($daily_budget_micros as hugeint), daily_budget_micros)
            * (60 * hour(event_minute) + minute(event_minute) + 1) + 1440) // 2880 as bigint
    ) as clock_micros,
    case
        when coalesce(cast($daily_budget_micros as bigint), daily_budget_micros) is not null
            then greatest(0, spent_micros - coalesce(cast($daily_budget_micros as bigint), daily_budget_micros))
    end as overspend_micros
from fct_budget_pacing
where event_date = cast($day as date)
  and ($campaign_id is null or campaign_id = $campaign_id)
order by campaign_id, currency, event_minute
limit 50000
