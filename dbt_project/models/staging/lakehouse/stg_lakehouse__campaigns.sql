with

source as (

    select * from {{ source('lakehouse', 'campaigns') }}

),

renamed as (

    select
        campaign_id,
        store_id,
        billing_model,
        daily_budget_micros,
        currency,
        {{ utc_timestamp('valid_from') }} as valid_from,
        {{ utc_timestamp('valid_to') }} as valid_to
    from source

)

select * from renamed
