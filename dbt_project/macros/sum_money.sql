{# The sum of a column of nanos or micros as a HUGEINT: 9,300 clicks at the highest price overflow a BIGINT. #}
{% macro sum_money(column) -%}
    cast(sum({{ column }}) as hugeint)
{%- endmacro %}
