{# An amount in units of its currency as a DECIMAL(38,4), rounded half away from zero to the decimals of the currency:
   12,345,000,000 nanos are 12.3500 EUR and 12.0000 JPY. Integers throughout. For people to read: sums of it drift. #}
{% macro nanos_to_decimal(nanos, currency) -%}
    {%- set unit = currency_minor_nanos(currency) -%}
    cast(
        sign({{ nanos }}) * ((abs(cast({{ nanos }} as hugeint)) + {{ unit }} // 2) // {{ unit }}) * ({{ unit }} // 100000)
        as decimal(38, 0)
    ) * cast(0.0001 as decimal(4, 4))
{%- endmacro %}
