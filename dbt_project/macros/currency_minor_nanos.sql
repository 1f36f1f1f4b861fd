{# Nanos in one minor unit of a currency by ISO 4217: a cent, a yen, a fils. Two decimals where ISO names no other. #}
{% macro currency_minor_nanos(currency) -%}
    case
        when {{ currency }} in (
            'BIF', 'CLP', 'DJF', 'GNF', 'ISK', 'JPY', 'KMF', 'KRW', 'PYG', 'RWF', 'UGX', 'UYI', 'VND', 'VUV', 'XAF', 'XOF', 'XPF'
        ) then 1000000000
        when {{ currency }} in ('BHD', 'IQD', 'JOD', 'KWD', 'LYD', 'OMR', 'TND') then 1000000
        when {{ currency }} in ('CLF', 'UYW') then 100000
        else 10000000
    end
{%- endmacro %}
