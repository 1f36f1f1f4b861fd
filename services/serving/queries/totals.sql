-- Everything, by currency: the numbers to hold beside the marts. Sums of nanos are exact; as plain sums they would be doubles.
select
    currency,
    sum(impressions) as impressions,
    sum(clicks) as clicks,
    sum(invalid_impressions) as invalid_impressions,
    sum(invalid_clicks) as invalid_clicks,
    sumprecision(spend_nanos) as spend_nanos,
    sumprecision(invalid_spend_nanos) as invalid_spend_nanos
from ads_metrics
where event_minute >= 0
  and event_date >= :from_day
  and event_date <= :to_day
group by currency
order by currency
limit 50000
