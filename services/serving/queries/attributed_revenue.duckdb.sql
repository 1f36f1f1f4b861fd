select
    touch_date,
    store_id,
    campaign_id,
    currency,
    sum(credit_micros) as revenue_micros
from fct_attribution_credits
where model = $model
  and window_days = $window_days
  and credit_micros <> 0
  and touch_date >= cast($from_day as date)
  and touch_date <= cast($to_day as date)
  and ($campaign_id is null or campaign_id = $campaign_id)
  and ($store_id is null or store_id = $store_id)
group by all
order by touch_date, store_id, campaign_id, currency
limit 50000
