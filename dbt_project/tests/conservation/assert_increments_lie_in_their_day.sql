-- event_date is the partition of the increment's minute: pruning by date must never lose a row. Minutes are whole.
{{ config(severity='error') }}

select
    record_uuid,
    event_minute,
    event_date
from {{ ref('int_increments__completed') }}
where
    event_date is distinct from cast(event_minute as date)
    or event_minute <> date_trunc('minute', event_minute)
