{# As nanos_to_decimal, from micros. A separate formula, because 1000 * micros may not fit into a HUGEINT. #}
{% macro micros_to_decimal(micros, currency) -%}
    {%- set unit = currency_minor_nanos(currency) -%}
    cast(
        sign({{ micros }}) * ((abs(cast({{ micros }} as hugeint)) + {{ unit }} // 2000) // ({{ unit }} // 1000)) * ({{ unit }} // 100000)
        as decimal(38, 0)
    ) * cast(0.0001 as decimal(4, 4))
{%- endmacro %}
