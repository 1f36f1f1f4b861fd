-- Revenue credited to clicks by one model and window, dated by the touch. Only what the newest revision of an order says (is_current).
select
    todatetime(touch_time, 'yyyy-MM-dd') as touch_date,
    store_id,
    campaign_id,
    currency,
    sumprecision(:credit) as revenue_micros
from attributed_orders
where is_current = 1
  and :credit <> 0
  and touch_time >= :from_day_start_ms
  and touch_time < :to_day_end_ms
  and campaign_id = :campaign_id
  and store_id = :store_id
group by touch_date, store_id, campaign_id, currency
order by touch_date, store_id, campaign_id, currency
limit 50000
