with

source as (

    select * from {{ source('lakehouse', 'names') }}

),

renamed as (

    select
        kind,
        id,
        name
    from source

)

select * from renamed
