with

days as (

    select * from {{ ref('fct_advertiser_performance') }}

),

bounds as (

    select
        min(event_date) as first_date,
        max(event_date) as last_date
    from days

),

dates as (

    select cast(unnest(generate_series(first_date, last_date, interval 1 day)) as date) as event_date
    from bounds

),

final as (

    select
        event_date,
        cast(date_trunc('week', event_date) as date) as week_start,
        cast(date_trunc('month', event_date) as date) as month_start,
        cast(date_trunc('quarter', event_date) as date) as quarter_start,
        year(event_date) as year,
        isodow(event_date) as iso_weekday
    from dates

)

select * from final
