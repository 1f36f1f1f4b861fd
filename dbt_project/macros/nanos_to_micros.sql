{# Whole micros of a whole number of nanos, rounded half away from zero: 500 -> 1, 499 -> 0, -500 -> -1.
   Integer arithmetic throughout, in a HUGEINT: a sum of nanos does not fit into 64 bits. Round a reported
   total once, from the sum of its nanos; micros that were rounded before are not to be summed into one. #}
{% macro nanos_to_micros(nanos) -%}
    cast(sign({{ nanos }}) * ((abs(cast({{ nanos }} as hugeint)) + 500) // 1000) as hugeint)
{%- endmacro %}
