select
    date_trunc('hour', event_minute) as event_hour,
    campaign_id,
    currency,
    cast(sum(impressions) as bigint) as impressions,
    cast(sum(clicks) as bigint) as clicks,
    cast(sign(sum(spend_nanos)) * ((abs(sum(spend_nanos)) + 500) // 1000) as bigint) as spend_micros
from fct_campaign_minute
where event_date >= cast($from_day as date)
  and event_date <= cast($to_day as date)
  and ($campaign_id is null or campaign_id = $campaign_id)
  and ($store_id is null or store_id = $store_id)
group by all
order by event_hour, campaign_id, currency
limit 50000
