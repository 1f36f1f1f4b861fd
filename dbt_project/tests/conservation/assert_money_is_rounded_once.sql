-- An amount that people read is within half a minor unit of its nanos, and has no more decimals than its currency.
{{ config(severity='error') }}

{# Mart, exact amount in nanos, the amount that people read. #}
{% set amounts = [
    ('fct_campaign_minute', 'spend_nanos', 'spend'),
    ('fct_campaign_minute', 'invalid_spend_nanos', 'invalid_spend'),
    ('fct_campaign_minute', '(spend_nanos + invalid_spend_nanos)', 'gross_spend'),
    ('fct_campaign_day', 'spend_nanos', 'spend'),
    ('fct_campaign_day', 'invalid_spend_nanos', 'invalid_spend'),
    ('fct_campaign_day', '(spend_nanos + invalid_spend_nanos)', 'gross_spend'),
] %}

{% for mart, nanos, amount in amounts %}
    select
        '{{ mart }}.{{ amount }}' as amount_of,
        currency,
        {{ nanos }} as nanos,
        {{ amount }} as amount
    from {{ ref(mart) }}
    where
        2 * abs({{ nanos }} - cast({{ amount }} * 10000 as hugeint) * 100000) > {{ currency_minor_nanos('currency') }}
        or cast({{ amount }} * 10000 as hugeint) * 100000 % {{ currency_minor_nanos('currency') }} <> 0
    {% if not loop.last %}union all{% endif %}
{% endfor %}
