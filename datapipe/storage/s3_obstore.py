"""Ranges of objects through obstore, which takes less of the client's CPU time for them than boto3 (`make bench`)."""

import logging
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock, current_thread, main_thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import obstore
from botocore.exceptions import BotoCoreError
from obstore.exceptions import BaseError
from obstore.store import S3Store

from datapipe.core.config import StorageConfig
from datapipe.storage.retry import PassingFault
from datapipe.storage.s3_client import Connection, connect_timeout_s, connection
from datapipe.storage.s3_errors import PASSING_STATUS, S3Address, unanswered

log = logging.getLogger(__name__)

ERRORS = (BaseError, OSError, ValueError)
"""Everything obstore raises: its own errors, FileNotFoundError, and ValueError for keys it does not take."""
UNTRUSTED = ("certificate", "CaUsedAsEndEntity", "UnknownIssuer", "BadSignature", "NotValidForName")
"""What rustls, which obstore brings along, says of a certificate that it does not take. It is stricter than OpenSSL,
which boto3 uses: it takes no certificate for a server's that is an authority's as well, as self-signed ones are."""
_telling, _told = Lock(), set[str]()
"""Endpoints of which it was said that obstore does not trust them: once, however many threads and buckets meet one."""
MOST_IN_VAIN = 10
"""obstore is given up where boto3 had to step in so many times in a row, and could read."""
CREDENTIALS_FOR = timedelta(minutes=8)
"""How long credentials are used before boto3 is asked for them again, which renews those that expire 10 minutes before
they do. obstore itself asks 5 minutes before the time it was told."""


class Ranges:
    """Reads ranges of the objects in one bucket. Safe to share between threads, lost in a fork."""

    def __init__(self, bucket: str, config: StorageConfig, client: Connection) -> None:
        at = _address(client.client, bucket)
        self._bucket = S3Store(
            bucket,
            endpoint=at.endpoint,
            virtual_hosted_style_request=at.names_bucket,
            region=client.client.meta.region_name,
            credential_provider=_credentials(client.session),
            client_options=_options(at.endpoint, config, client.authorities),
            retry_config={"max_retries": 0},  # see `keep_trying`
        )
        self._answered = client.answered
        self._in_vain = 0

    def take(self, key: str) -> bool:
        """Whether this way of reading may be tried.

        Not from the main thread, where signals would wait for the answer; not for keys whose slashes obstore strips.
        """
        return self._in_vain < MOST_IN_VAIN and current_thread() is not main_thread() and key == key.strip("/")

    def first(
        self, key: str, start: int, size: int, place: S3Address, then: Callable[[], bytes]
    ) -> Callable[[], bytes]:
        """A request for bytes [start, start + size) whose first try is obstore's.

        Every further one is `then`, boto3's, which knows what each answer means and how long the store asks to wait:
        obstore passes little of that on.
        """
        tried = False

        def request() -> bytes:
            nonlocal tried
            if not tried:
                tried = True
                try:
                    return self._read(key, start, size)
                except ERRORS as error:
                    if any(word in str(error) for word in UNTRUSTED):
                        return self._without(place, then)
                    answer = str(error).partition("\n")[0].rpartition(" - ")[-1]
                    if _passing(answer):
                        raise PassingFault(unanswered(answer, place)) from error
            data = then()
            self._note_in_vain(place)
            return data

        return request

    def _read(self, key: str, start: int, size: int) -> bytes:
        answer = obstore.get(self._bucket, key, options={"range": (start, start + size)})
        data = answer.bytes().to_bytes()
        self._answered.set()
        if len(data) != min(size, answer.meta["size"] - start):
            raise ValueError(f"{len(data)} of {size} bytes from {start} of {answer.meta['size']}")
        self._in_vain = 0
        return data

    def _without(self, place: S3Address, then: Callable[[], bytes]) -> bytes:
        """boto3 has trusted the server before (it was asked for the size, or the listing): no wait helps obstore. What
        boto3 says now counts, and where it can read, it does so from here on."""
        data = then()
        with _telling:
            told = place.endpoint in _told
            _told.add(place.endpoint)
        if not told:
            log.warning("%s: boto3 trusts the certificate there, obstore does not, so boto3 reads, at more CPU time; a "
                        "certificate signed by an authority for this server suits both", place.where)  # fmt: skip
        self._in_vain = MOST_IN_VAIN
        return data

    def _note_in_vain(self, place: S3Address) -> None:
        self._in_vain += 1
        if self._in_vain == MOST_IN_VAIN:
            log.warning("%s: obstore cannot read here, so boto3 goes on with it, at more CPU time", place.where)


@lru_cache(maxsize=8)
def ranges(bucket: str, config: StorageConfig, process: int) -> Ranges | None:
    """None where obstore cannot be set up as boto3 is: without credentials, or in a fork of a process that used it."""
    if _home() != process:
        return None
    try:
        return Ranges(bucket, config, connection(config, process))
    except (BotoCoreError, BaseError, OSError, ValueError) as error:
        log.info("s3://%s: obstore cannot be set up (%s), so boto3 reads", bucket, error)
        return None


@cache
def _home() -> int:
    """The process that used obstore first. Its threads do not survive a fork: without them a request waits for ever."""
    return os.getpid()


class _Address(NamedTuple):
    endpoint: str
    names_bucket: bool
    """Whether the endpoint's host names the bucket (virtual-hosted style), or the path does."""


def _address(client: Any, bucket: str) -> _Address:
    """Where boto3 finds the bucket, by its own rules. The style shows in what it would sign for others, whose host,
    unlike that of its requests, may be the one of all regions."""
    url = urlsplit(client.meta.endpoint_url)
    signed = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "key"}))
    names_bucket = signed.netloc.startswith(f"{bucket}.")
    host = f"{bucket}.{url.netloc}" if names_bucket else url.netloc
    return _Address(f"{url.scheme}://{host}{url.path}".rstrip("/"), names_bucket)


def _options(endpoint: str, config: StorageConfig, authorities: str) -> Any:
    options: dict[str, Any] = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=connect_timeout_s(config)),
        "read_timeout": timedelta(seconds=config.timeout_s),
        "timeout": timedelta(seconds=max(config.give_up_s, config.timeout_s)),
    }
    return {**options, "root_certificate": Path(authorities).read_bytes()} if authorities else options


def _credentials(session: Any) -> Callable[[], Any]:
    credentials = session.get_credentials()
    if credentials is None:
        raise ValueError("no credentials")

    def now() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_FOR,
        }

    return now


def _passing(answer: str) -> bool:
    """Whether a wait may help: no whole answer, or one that says so."""
    status = re.search(r"status code: (\d{3})", answer)
    if status is None:
        return "HTTP error" in answer
    return int(status[1]) in PASSING_STATUS
