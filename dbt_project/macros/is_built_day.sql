{# Whether this build makes the rows of a day. A full build makes all days; a row without a day has none to compare. #}
{% macro is_built_day(day) -%}
    {{ day }} in (select days.event_date from {{ build_table('days') }} as days)
{%- endmacro %}
