-- How far each region has come: its newest minute, and the newest commit whose increments are here.
select
    region,
    count(*) as increments,
    max(event_minute) as newest_minute,
    max(version) as newest_version,
    max(committed_at) as newest_commit
from ads_metrics
group by region
order by region
limit 50000
