-- offered = accepted + duplicate + conflict + rejected, per hour and region; the marks are parts of accepted.
{{ config(severity='error') }}

select *
from {{ ref('fct_event_accounting') }}
where
    offered <> accepted + duplicate + conflict + rejected
    or late > accepted
    or invalid_traffic > accepted
    or unpriced > accepted
    or least(offered, accepted, duplicate, conflict, rejected, late, invalid_traffic, unpriced) < 0
