{# A Delta TIMESTAMP is an instant and arrives with a zone; the marts carry plain timestamps that are UTC. #}
{% macro utc_timestamp(column) -%}
    cast({{ column }} at time zone 'UTC' as timestamp)
{%- endmacro %}
