{# A table with what a build was told, which it creates before the models: `builds`, a row for each group of marts
   that it builds; `versions`, the Delta tables; `earlier`, the rows of mart_build for the other groups; `days`, the
   days that it builds. #}
{% macro build_table(name) -%}
    "work"."build"."{{ name }}"
{%- endmacro %}
