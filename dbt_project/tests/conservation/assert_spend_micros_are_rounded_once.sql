-- The micros of a row are within half a micro of its nanos; a tie rounds away from zero.
{{ config(severity='error') }}

select
    'minute' as grain,
    spend_nanos,
    spend_micros
from {{ ref('fct_campaign_minute') }}
where
    abs(cast(spend_nanos as hugeint) - cast(spend_micros as hugeint) * 1000) > 500
    or abs(cast(spend_nanos as hugeint)) - abs(cast(spend_micros as hugeint)) * 1000 = 500
union all
select
    'day' as grain,
    spend_nanos,
    spend_micros
from {{ ref('fct_campaign_day') }}
where
    abs(cast(spend_nanos as hugeint) - cast(spend_micros as hugeint) * 1000) > 500
    or abs(cast(spend_nanos as hugeint)) - abs(cast(spend_micros as hugeint)) * 1000 = 500
