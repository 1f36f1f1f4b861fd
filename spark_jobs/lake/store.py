"""Reaches object stores: credentials, and the options by which obstore and delta-rs use them (DuckDB: `duck.py`).

A location is a path of this machine or a URI: ``s3://`` and its other name ``s3a://`` (tested on SeaweedFS), ``gs://`` and ``az://``
(by the same libraries, never tested; DuckDB then finds credentials itself). Credentials come from where the AWS command line finds
them: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, a profile (``AWS_PROFILE``), or the machine's role.
``AWS_REGION``, ``AWS_ENDPOINT_URL`` and ``AWS_ALLOW_HTTP`` name a store that is not Amazon's. Nothing here prints a credential.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from obstore.store import ObjectStore, from_url

from spark_jobs.errors import ConfigurationError, StoreError
from spark_jobs.failure import one_line

if TYPE_CHECKING:
    from botocore.session import Session

_S3 = ("s3://", "s3a://")
_NO_REGION = "us-east-1"  # a store that is not Amazon's has any region
RETRY_SECONDS = 45.0
"""How long a client repeats a request that the store refuses for a moment."""
_MOST_RETRIES = 40  # RETRY_SECONDS is the bound: the waits are random
_BOTOCORE_ATTEMPTS = 8  # with waits of up to 20 s
_FIRST_WAIT_MS, _LONGEST_WAIT_MS = 100, 3_000
_ANSWER_SECONDS, _CONNECT_SECONDS = 30, 5


@dataclass(frozen=True)
class Access:
    """How to reach an S3 store. ``endpoint`` None: Amazon's. ``repr`` shows no credential."""

    key_id: str = field(repr=False)
    secret: str = field(repr=False)
    token: str | None = field(repr=False)
    region: str
    endpoint: str | None
    allow_http: bool


@cache
def _session() -> Session:
    from botocore.session import Session  # here: it takes 0.2 s, and local paths do not need it

    return Session()


def access_to(uri: str) -> Access | None:
    """Return the present access to an S3 location; None for a path or another store. Raises as `s3_access`."""
    return s3_access() if uri.startswith(_S3) else None


def s3_access() -> Access:
    """Return the present access to S3: credentials of a role or a profile that expire are fetched anew in time.

    Raises ConfigurationError if there are no credentials.
    """
    session = _session()
    found = session.get_credentials()
    if found is None:
        raise ConfigurationError(
            "there are no credentials for s3://",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; docs/object-store.md",
        )
    try:
        frozen = found.get_frozen_credentials()
    except Exception as error:  # of botocore, of many kinds
        raise ConfigurationError(f"the credentials for s3:// cannot be had: {one_line(error)}") from error
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or _NO_REGION
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
    return Access(frozen.access_key, frozen.secret_key, frozen.token, region, endpoint, allow_http)


def s3_pages(**arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield the pages of a listing of S3 by botocore, which takes every key. Raises StoreError."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    access = s3_access()
    client = _session().create_client(
        "s3",
        region_name=access.region,
        endpoint_url=access.endpoint,
        aws_access_key_id=access.key_id,
        aws_secret_access_key=access.secret,
        aws_session_token=access.token,
        config=Config(retries={"max_attempts": _BOTOCORE_ATTEMPTS, "mode": "standard"}),
    )
    try:
        yield from client.get_paginator("list_objects_v2").paginate(**arguments)
    except (BotoCoreError, ClientError) as error:
        raise StoreError(f"list {arguments['Bucket']}/{arguments['Prefix']} failed: {one_line(error)}") from error


def delta_options(uri: str) -> dict[str, str] | None:
    """Return the storage options of delta-rs for a location; None if it needs none."""
    access = access_to(uri)
    if access is None:
        return None
    options = {
        "aws_access_key_id": access.key_id,
        "aws_secret_access_key": access.secret,
        "aws_region": access.region,
        "aws_conditional_put": "etag",
        "aws_allow_http": str(access.allow_http).lower(),
        "max_retries": str(_MOST_RETRIES),
        "retry_timeout": f"{RETRY_SECONDS:g}s",
        "backoff_config.init_backoff": f"{_FIRST_WAIT_MS}ms",
        "backoff_config.max_backoff": f"{_LONGEST_WAIT_MS}ms",
        "timeout": f"{_ANSWER_SECONDS}s",
        "connect_timeout": f"{_CONNECT_SECONDS}s",
    }
    if access.token is not None:
        options["aws_session_token"] = access.token
    if access.endpoint is not None:
        options["aws_endpoint_url"] = access.endpoint
    return options


def object_store(uri: str, *, try_seconds: float | None = None) -> ObjectStore:
    """Return obstore's client of an object store, for keys below ``uri``.

    ``try_seconds``: each request is tried once, for so long. By default it is repeated for RETRY_SECONDS.
    """
    return _object_store(uri, access_to(uri), try_seconds)


@lru_cache(maxsize=256)  # credentials that expire leave clients behind
def _object_store(uri: str, access: Access | None, try_seconds: float | None) -> ObjectStore:
    options: Any = {}
    client: Any = {"timeout": timedelta(seconds=_ANSWER_SECONDS), "connect_timeout": timedelta(seconds=_CONNECT_SECONDS)}
    if access is not None:
        client["allow_http"] = access.allow_http
        options = {
            "config": {
                "aws_access_key_id": access.key_id,
                "aws_secret_access_key": access.secret,
                "aws_region": access.region,
                "aws_conditional_put": "etag",
                **({"aws_session_token": access.token} if access.token is not None else {}),
                **({"aws_endpoint": access.endpoint} if access.endpoint is not None else {}),
            },
        }
    waits: Any = {
        "init_backoff": timedelta(milliseconds=_FIRST_WAIT_MS),
        "max_backoff": timedelta(milliseconds=_LONGEST_WAIT_MS),
        "base": 2,
    }
    retries: Any = {"max_retries": _MOST_RETRIES, "backoff": waits, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
    if try_seconds is not None:
        limit = timedelta(seconds=try_seconds)
        client |= {"timeout": limit, "connect_timeout": limit}
        retries |= {"max_retries": 0, "retry_timeout": limit}
    try:
        return from_url(uri, retry_config=retries, client_options=client, **options)
    except Exception as error:  # obstore raises its own kinds, and ValueError
        raise ConfigurationError(f"{uri} cannot be opened: {one_line(error)}") from error
