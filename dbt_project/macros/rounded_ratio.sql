{# A whole number of a per b, both whole, rounded half away from zero: 5 per 2 -> 3, 4 per 3 -> 1. Null where b is 0.
   Integer arithmetic throughout, in a HUGEINT. b is not negative. #}
{% macro rounded_ratio(a, b) -%}
    cast(
        sign({{ a }}) * ((2 * abs(cast({{ a }} as hugeint)) + {{ b }}) // nullif(2 * cast({{ b }} as hugeint), 0)) as hugeint
    )
{%- endmacro %}
