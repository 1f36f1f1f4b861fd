{# The time of the build, UTC, without a zone. Decides which row of a campaign is the current one. #}
{% macro built_at() -%}
    (select max(builds.built_at) from {{ build_table('builds') }} as builds)
{%- endmacro %}
