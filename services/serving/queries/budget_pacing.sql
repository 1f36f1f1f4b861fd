-- The spend of a day by minute; what was spent up to the end of each minute is added up from it. Minutes without spend are left out.
select
    event_minute,
    campaign_id,
    currency,
    sumprecision(spend_nanos) as spend_nanos
from ads_metrics
where event_date = :day
  and campaign_id = :campaign_id
group by event_minute, campaign_id, currency
order by campaign_id, currency, event_minute
limit 50000
