-- What each campaign delivered and spent a day. Net is billable, gross is net and invalid.
select
    event_date,
    campaign_id,
    store_id,
    currency,
    sum(impressions) as impressions,
    sum(clicks) as clicks,
    sum(invalid_impressions) as invalid_impressions,
    sum(invalid_clicks) as invalid_clicks,
    sumprecision(spend_nanos) as spend_nanos,
    sumprecision(invalid_spend_nanos) as invalid_spend_nanos
from ads_metrics
where event_date >= :from_day
  and event_date <= :to_day
  and campaign_id = :campaign_id
  and store_id = :store_id
group by event_date, campaign_id, store_id, currency
order by event_date, campaign_id, store_id, currency
limit 50000
