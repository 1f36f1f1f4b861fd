{# As nanos_to_decimal, from micros. #}
{% macro micros_to_decimal(micros, currency) -%}
    {{ nanos_to_decimal('(1000 * cast(' ~ micros ~ ' as hugeint))', currency) }}
{%- endmacro %}
