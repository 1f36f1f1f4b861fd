select
    currency,
    cast(sum(impressions) as bigint) as impressions,
    cast(sum(clicks) as bigint) as clicks,
    cast(sum(invalid_impressions) as bigint) as invalid_impressions,
    cast(sum(invalid_clicks) as bigint) as invalid_clicks,
    sum(spend_nanos) as spend_nanos,
    sum(invalid_spend_nanos) as invalid_spend_nanos
from fct_campaign_day
where ($from_day is null or event_date >= cast($from_day as date))
  and ($to_day is null or event_date <= cast($to_day as date))
group by currency
order by currency
limit 50000
