{# DuckDB sums BIGINT to HUGEINT. The cast back fails loudly where a total no longer fits; it never wraps. #}
{% macro sum_bigint(column) -%}
    cast(sum({{ column }}) as bigint)
{%- endmacro %}
