-- Net delivery and spend of each campaign by hour.
select
    datetrunc('HOUR', event_minute) as event_hour,
    campaign_id,
    currency,
    sum(impressions) as impressions,
    sum(clicks) as clicks,
    sumprecision(spend_nanos) as spend_nanos
from ads_metrics
where event_date >= :from_day
  and event_date <= :to_day
  and campaign_id = :campaign_id
  and store_id = :store_id
group by event_hour, campaign_id, currency
order by event_hour, campaign_id, currency
limit 50000
