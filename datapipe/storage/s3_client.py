"""The boto3 client behind S3 stores, and a watch on its answers that botocore does not keep itself."""

import os
from functools import lru_cache
from threading import Event
from typing import Any, NamedTuple

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, IncompleteReadError

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from datapipe.core.process_setup import misread, unread

CONNECT_TIMEOUT_S = 10.0
MOST_CONNECTIONS = 32


class Connection(NamedTuple):
    """A client, safe to share between threads, what it was made from, and whether its endpoint has ever answered."""

    client: Any
    session: boto3.session.Session
    authorities: str
    """File of certificates that the client trusts, empty for the system's."""
    answered: Event


@lru_cache(maxsize=8)
def connection(config: StorageConfig, process: int) -> Connection:
    """One per process, as clients do not survive a fork. botocore's own retries are off: see `keep_trying`."""
    options = Config(
        retries={"total_max_attempts": 1},
        max_pool_connections=MOST_CONNECTIONS,
        read_timeout=config.timeout_s,
        connect_timeout=connect_timeout_s(config),
        request_checksum_calculation=config.checksums,
        response_checksum_validation=config.checksums,
    )
    try:
        core = botocore.session.get_session()
        session = boto3.session.Session(botocore_session=core)
        authorities = core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE", "")
        region = session.region_name or "us-east-1"
        client = session.client("s3", endpoint_url=config.endpoint_url or None, config=options, region_name=region)
    except (BotoCoreError, ValueError) as error:  # a profile that is not there; no full address
        if names := misread(error):
            raise unread(names, error) from error
        raise StorageError(
            f"S3 cannot be set up: {error}",
            where=config.endpoint_url,
            hint="check AWS_PROFILE; an endpoint is a full address such as http://10.0.0.5:9000",
        ) from error
    answered = Event()

    def watch(response_dict: dict[str, Any], operation_model: Any, **_: object) -> None:
        answered.set()
        if operation_model.http["method"] != "HEAD":
            _refuse_cut(response_dict)

    client.meta.events.register("before-parse.s3", watch)
    return Connection(client, session, authorities, answered)


def connect_timeout_s(config: StorageConfig) -> float:
    """Seconds after which an attempt to connect counts as failed."""
    return min(CONNECT_TIMEOUT_S, config.timeout_s)


def _refuse_cut(answer: dict[str, Any]) -> None:
    """botocore compares the length of streamed bodies alone: a listing cut to nothing would be an empty listing."""
    body, promised = answer["body"], answer["headers"].get("Content-Length")
    if isinstance(body, bytes) and promised is not None and len(body) != int(promised):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=int(promised))
