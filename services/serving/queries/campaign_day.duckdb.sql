select
    event_date,
    campaign_id,
    store_id,
    currency,
    impressions,
    clicks,
    invalid_impressions,
    invalid_clicks,
    gross_impressions,
    gross_clicks,
    cast(clicks / nullif(impressions, 0) as double) as ctr,
    spend_micros,
    invalid_spend_micros,
    gross_spend_micros
from fct_campaign_day
where event_date >= cast($from_day as date)
  and event_date <= cast($to_day as date)
  and ($campaign_id is null or campaign_id = $campaign_id)
  and ($store_id is null or store_id = $store_id)
order by event_date, campaign_id, store_id, currency
limit 50000
