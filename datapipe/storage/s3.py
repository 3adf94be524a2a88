"""A prefix in a bucket of S3 or of any server that speaks its protocol, through boto3."""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from datapipe.config import StorageConfig
from datapipe.errors import NotFoundError, StorageError
from datapipe.storage.store import Data, Entry, Store

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_WAIT_S = 0.2
CONNECT_TIMEOUT_S = 10.0
PART_BYTES = 16 << 20
"""Size of the parts of a multipart upload; larger data than four of them is sent in parts."""
MOST_PARTS = 9_000
PARTS_IN_FLIGHT = 4
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {
    "SlowDown",
    "RequestTimeout",
    "RequestTimeoutException",
    "Throttling",
    "ThrottlingException",
    "InternalError",
    "ServiceUnavailable",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
}
TAKEN_STATUS = {409, 412}
"""Answers to a conditional put that lost: 412, on some stores 409."""


class S3Store(Store):
    """A prefix in a bucket of S3 or of any server that speaks its protocol, through boto3."""

    def __init__(self, url: str, config: StorageConfig) -> None:
        path = url.removeprefix("s3://").rstrip("/")
        self.url, self.config = f"s3://{path}", config
        self.bucket, _, self.prefix = path.partition("/")
        if not self.bucket:
            raise StorageError("the address names no bucket", where=url, hint="s3://bucket/prefix")

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        if size == 0:
            return b""
        given: dict[str, Any] = {}
        if start or size is not None:
            given["Range"] = f"bytes={start}-{'' if size is None else start + size - 1}"

        def fetch() -> bytes:
            try:
                return self._client.get_object(Bucket=self.bucket, Key=self._key(name), **given)["Body"].read()
            except _client_error() as error:
                if _status(error) == 416:  # beyond the end
                    return b""
                raise

        return self._try(fetch, name)

    def size(self, name: str) -> int:
        return self._try(lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(name)), name)[
            "ContentLength"
        ]

    def list(self, prefix: str = "") -> Iterator[Entry]:
        skipped = len(self._key(""))
        given = {"Bucket": self.bucket, "Prefix": self._key(prefix)}
        while True:
            page = self._try(lambda: self._client.list_objects_v2(**given), prefix)
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # a console's folder marker
                    yield Entry(item["Key"][skipped:], item["Size"])
            if not page.get("IsTruncated"):
                return
            given["ContinuationToken"] = page["NextContinuationToken"]

    def create(self, name: str, data: Data) -> bool:
        """Create-once by a conditional put. A look first covers the stores that ignore or refuse the condition:
        there, two writers at the very same moment may both write, each a whole object."""
        if self.exists(name):
            return False
        try:
            self._write(name, data, {"IfNoneMatch": "*"})
        except _Taken:
            return False
        return True

    def replace(self, name: str, data: Data) -> None:
        self._write(name, data, {})

    def delete(self, name: str) -> None:
        self._try(lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(name)), name)

    def at(self, *parts: str) -> Store:
        return S3Store("/".join((self.url, *parts)), self.config)

    @property
    def _client(self) -> Any:
        try:
            return _s3_client(self.config, os.getpid())
        except ValueError as error:  # botocore's way to refuse an endpoint
            raise self._misuse(error, "") from error

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _write(self, name: str, data: Data, condition: dict[str, str]) -> None:
        total = data.stat().st_size if isinstance(data, Path) else len(data)
        send = self._put if total <= 4 * PART_BYTES else self._put_parts
        try:
            send(name, data, total, condition)
        except _Unsupported:
            send(name, data, total, {})

    def _put(self, name: str, data: Data, total: int, condition: dict[str, str]) -> None:
        body = data.read_bytes() if isinstance(data, Path) else bytes(data)
        self._try(
            lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=body, **condition),
            name,
            conditional=bool(condition),
        )

    def _put_parts(self, name: str, data: Data, total: int, condition: dict[str, str]) -> None:
        """A multipart upload: invisible until it is completed, aborted when anything fails."""
        target = {"Bucket": self.bucket, "Key": self._key(name)}
        upload = self._try(lambda: self._client.create_multipart_upload(**target), name)["UploadId"]
        size = max(PART_BYTES, -(-total // MOST_PARTS))

        def send(number: int) -> dict[str, Any]:
            body = _slice(data, number * size, size)
            answer = self._try(
                lambda: self._client.upload_part(**target, UploadId=upload, PartNumber=number + 1, Body=body), name
            )
            checksums = {key: value for key, value in answer.items() if key.startswith("Checksum")}
            return {
                "PartNumber": number + 1,
                "ETag": answer["ETag"],
                **{key: value for key, value in checksums.items() if key != "ChecksumType"},
            }

        try:
            with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
                parts = list(pool.map(send, range(-(-total // size))))
            self._try(
                lambda: self._client.complete_multipart_upload(
                    **target, UploadId=upload, MultipartUpload={"Parts": parts}, **condition
                ),
                name,
                conditional=bool(condition),
            )
        except BaseException:
            self._try(lambda: self._client.abort_multipart_upload(**target, UploadId=upload), name, absent_is_fine=True)
            raise

    def _try(
        self, request: Callable[[], T], name: str, *, conditional: bool = False, absent_is_fine: bool = False
    ) -> T:
        """One request, repeated while its failure looks passing, at most `config.attempts` times."""
        from botocore import exceptions as faults

        passing = (faults.HTTPClientError, faults.ConnectionError, faults.IncompleteReadError, ConnectionError)
        for attempt in range(1, self.config.attempts + 1):
            try:
                return request()
            except faults.ClientError as error:
                if conditional and _status(error) in TAKEN_STATUS:
                    raise _Taken from error
                if conditional and _status(error) == 501:
                    raise _Unsupported from error
                if absent_is_fine and _status(error) == 404:
                    return None  # type: ignore[return-value]
                if attempt == self.config.attempts or not _is_passing(error):
                    raise self._refusal(error, name) from error
                reason = _code(error)
            except passing as error:
                reason = str(error)
                if attempt == self.config.attempts:
                    raise self._silence(error, name, attempt) from error
            except faults.BotoCoreError as error:
                raise self._misuse(error, name) from error
            wait = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            log.warning(
                "%s: %s; try %d of %d follows in %.1f s",
                self.address(name),
                reason,
                attempt + 1,
                self.config.attempts,
                wait,
            )
            time.sleep(wait)
        raise AssertionError("the loop above returns or raises")

    def _refusal(self, error: Exception, name: str) -> StorageError:
        status, code = _status(error), _code(error)
        where = f"{self.address(name)} at {self._endpoint()}"
        if code == "NoSuchBucket":
            return StorageError(
                f"the bucket {self.bucket!r} does not exist",
                where=where,
                hint="check the bucket's name and the endpoint (--storage.endpoint-url); buckets are not made here",
            )
        if status == 403:
            return StorageError(
                f"the store refuses access ({code})",
                where=where,
                hint="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile) and the "
                "rights to read, list and write there",
            )
        if status == 404:
            return NotFoundError("the object does not exist", where=where, hint="check the address")
        message = error.response["Error"].get("Message") or code  # type: ignore[attr-defined]
        return StorageError(
            f"the store answered {status}: {message}",
            where=where,
            hint="a store that is busy or failing: run the same command again later",
        )

    def _silence(self, error: Exception, name: str, attempts: int) -> StorageError:
        return StorageError(
            f"the store cannot be reached ({attempts} tries): {error}",
            where=f"{self.address(name)} at {self._endpoint()}",
            hint="check the endpoint (--storage.endpoint-url or AWS_ENDPOINT_URL) and the network",
        )

    def _misuse(self, error: Exception, name: str) -> StorageError:
        hint = "check the endpoint (--storage.endpoint-url), the region and the address"
        if "redential" in str(error) or "profile" in str(error):
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return StorageError(f"the request could not be made: {error}", where=self.address(name), hint=hint)

    def _endpoint(self) -> str:
        return self._client.meta.endpoint_url


class _Taken(Exception):
    """A conditional put found the name in use."""


class _Unsupported(Exception):
    """The store knows no conditional puts."""


@lru_cache(maxsize=8)
def _s3_client(config: StorageConfig, process: int) -> Any:
    """One client per process (they do not survive a fork). Its own retries are off: they are in `_try`."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    options = Config(
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
        read_timeout=config.timeout_s,
        connect_timeout=min(CONNECT_TIMEOUT_S, config.timeout_s),
        request_checksum_calculation=config.checksums,
        response_checksum_validation=config.checksums,
    )
    return session.client(
        "s3", endpoint_url=config.endpoint_url or None, config=options, region_name=session.region_name or "us-east-1"
    )


def _client_error() -> type[Exception]:
    from botocore.exceptions import ClientError

    return ClientError


def _status(error: Any) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", _status(error)))


def _is_passing(error: Any) -> bool:
    return _status(error) in TRANSIENT_STATUS or _code(error) in TRANSIENT_CODES


def _slice(data: Data, start: int, size: int) -> bytes:
    if isinstance(data, Path):
        with open(data, "rb") as file:
            file.seek(start)
            return file.read(size)
    return bytes(memoryview(data)[start : start + size])
