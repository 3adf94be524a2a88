"""A prefix in a bucket of S3 or of any server that speaks its protocol: through boto3, ranges through obstore first."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from datapipe.core.parallel import in_order
from datapipe.storage.retry import keep_trying
from datapipe.storage.s3_client import connection
from datapipe.storage.s3_errors import ERRORS, S3Address, code_of, explained, refused_part, status_of
from datapipe.storage.s3_obstore import ranges
from datapipe.storage.store import Children, Data, Entry, Store, WrongRangeError

T = TypeVar("T")
Put = Callable[[str, Data, dict[str, str]], None]
"""(name, data, condition): one way of writing an object. Raises _Taken and _Unsupported where there is a condition."""

PART_BYTES = 16 << 20
"""Size of the parts of a multipart upload; larger data than four of them is sent in parts."""
MOST_PARTS = 9_000
PARTS_IN_FLIGHT = 4
MOST_DELETED = 1_000
"""Objects that one request may delete."""
DELETES_IN_FLIGHT = 8
"""Where each takes a request of its own."""
NO_BATCHES = {400, 405, 411, 501}
"""How servers answer that do not know the deletion of many objects, or not the checksum that boto3 sends with it."""
IF_ABSENT = {"IfNoneMatch": "*"}


class S3Store(Store):
    """A store on S3 or a service like it. Reading needs the rights to get and list, writing to put and delete as
    well."""

    def __init__(self, url: str, config: StorageConfig) -> None:
        path = url.removeprefix("s3://").rstrip("/")
        self.url, self.config = f"s3://{path}", config
        self.bucket, _, self.prefix = path.partition("/")
        if not self.bucket:
            raise StorageError("the address names no bucket", where=url, hint="s3://bucket/prefix")

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        if size == 0:
            return b""
        if start == 0 and size is None:
            return self._try(lambda: self._client.get_object(**self._target(name))["Body"].read(), name)
        return self._try(self._range(name, start, size), name)

    def _range(self, name: str, start: int, size: int | None) -> Callable[[], bytes]:
        def request() -> bytes:
            return self._read_range(name, start, size)

        fast = ranges(self.bucket, self.config, os.getpid())
        if size is not None and fast is not None and fast.take(self._key(name)):
            return fast.first(self._key(name), start, size, self._place(name), then=request)
        return request

    def _read_range(self, name: str, start: int, size: int | None) -> bytes:
        wanted = f"bytes={start}-{'' if size is None else start + size - 1}"
        try:
            answer = self._client.get_object(**self._target(name), Range=wanted)
        except ClientError as error:
            if status_of(error) == 416:  # beyond the end
                return b""
            raise
        data: bytes = answer["Body"].read()  # raises where the body is shorter than it was announced
        if not _is_range(answer.get("ContentRange", ""), len(data), start, size):
            raise WrongRangeError(
                f"the store answered {wanted} with {answer.get('ContentRange', 'no range')}, {len(data)} bytes",
                where=self.address(name),
                hint="data sets are read by ranges: use a store, or a proxy before it, that serves them",
            )
        return data

    def size(self, name: str) -> int:
        return self._try(lambda: self._client.head_object(**self._target(name)), name)["ContentLength"]

    def list(self, prefix: str = "", *, enter: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        for page in self._pages(prefix):
            yield from self._entries(page)

    def children(self) -> Children:
        folders: set[str] = set()
        files: set[str] = set()
        for page in self._pages("", Delimiter="/"):
            folders.update(item["Prefix"][len(self._key("")) : -1] for item in page.get("CommonPrefixes", ()))
            files.update(entry.name for entry in self._entries(page))
        return Children(sorted(folders), sorted(files))

    def _pages(self, prefix: str, **given: str) -> Iterator[dict[str, Any]]:
        given |= {"Bucket": self.bucket, "Prefix": self._key(prefix)}
        while True:
            page = self._try(lambda: self._client.list_objects_v2(**given), prefix)
            yield page
            if not page.get("IsTruncated"):
                return
            given["ContinuationToken"] = page["NextContinuationToken"]

    def _entries(self, page: dict[str, Any]) -> Iterator[Entry]:
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):  # a console's folder marker
                yield Entry(item["Key"][len(self._key("")) :], item["Size"])

    def put_if_absent(self, name: str, data: Data) -> bool:
        self.refuse_outside(name)
        return self._put_if_absent(self._way(data), name, data)

    def refuses_overwrite(self, name: str) -> bool:
        """In both ways of writing: there are servers that heed the condition for whole objects but not for parts."""
        written = [self._put_if_absent(way, name, b"overwritten") for way in (self._put, self._put_parts)]
        return not any(written)

    def replace(self, name: str, data: Data) -> None:
        self.refuse_outside(name)
        self._way(data)(name, data, {})

    def delete(self, name: str) -> None:
        self.refuse_outside(name)

        def remove() -> None:
            self.permit()
            self._client.delete_object(**self._target(name))

        self._try(remove, name)

    def delete_many(self, names: Iterable[str]) -> None:
        names = tuple(names)
        for name in names:
            self.refuse_outside(name)
        for start in range(0, len(names), MOST_DELETED):
            batch = names[start : start + MOST_DELETED]
            try:
                self._delete_batch(batch)
            except _Unsupported:
                deque(in_order(self.delete, batch, threads=DELETES_IN_FLIGHT), maxlen=0)

    def _delete_batch(self, names: Sequence[str]) -> None:
        """One request. Raises _Unsupported where the store does not know it."""
        objects = [{"Key": self._key(name)} for name in names]

        def remove() -> None:
            self.permit()
            try:
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            except ClientError as error:
                if status_of(error) in NO_BATCHES:
                    raise _Unsupported from error
                raise
            for fault in answer.get("Errors", ()):
                if fault.get("Code") not in ("NoSuchKey", "NoSuchVersion"):
                    raise refused_part(fault, "DeleteObjects")

        self._try(remove, names[0])

    def at(self, *parts: str) -> Store:
        for part in parts:
            self.refuse_outside(part)
        return S3Store("/".join((self.url, *parts)), self.config)

    @property
    def _client(self) -> Any:
        return connection(self.config, os.getpid()).client

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _target(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(name)}

    def _way(self, data: Data) -> Put:
        return self._put if _length(data) <= 4 * PART_BYTES else self._put_parts

    def _put_if_absent(self, way: Put, name: str, data: Data) -> bool:
        try:
            way(name, data, IF_ABSENT)
        except _Taken:
            return False
        except _Unsupported:
            way(name, data, {})
        return True

    def _put(self, name: str, data: Data, condition: dict[str, str]) -> None:
        body = _slice(data, 0, _length(data))
        self._commit(lambda: self._client.put_object(**self._target(name), Body=body, **condition), name, condition)

    def _put_parts(self, name: str, data: Data, condition: dict[str, str]) -> None:
        """A multipart upload: invisible until it is completed, aborted when anything fails."""
        total = _length(data)
        size = max(PART_BYTES, -(-total // MOST_PARTS))
        upload = self._try(lambda: self._client.create_multipart_upload(**self._target(name)), name)["UploadId"]
        target = {**self._target(name), "UploadId": upload}

        def send(number: int) -> dict[str, Any]:
            part = {"PartNumber": number + 1, "Body": _slice(data, number * size, size)}
            answer = self._try(lambda: self._client.upload_part(**target, **part), name)
            kept = {key: value for key, value in answer.items() if key.startswith("Checksum") or key == "ETag"}
            kept.pop("ChecksumType", None)
            return {"PartNumber": number + 1, **kept}

        def complete() -> None:
            try:
                self._client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, **condition)
            except ClientError as error:
                if code_of(error) != "NoSuchUpload" or not self.exists(name) or self.size(name) != total:
                    raise
                # Else an earlier try had completed it, and its answer was lost.

        try:
            with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
                parts = list(pool.map(send, range(-(-total // size))))
            self._commit(complete, name, condition)
        except BaseException:
            with suppress(StorageError):  # what failed first is what the user should read
                self._try(lambda: self._client.abort_multipart_upload(**target), name)
            raise

    def _commit(self, request: Callable[[], object], name: str, condition: dict[str, str]) -> None:
        """The request that makes the object visible. Raises _Taken, _Unsupported where there is a condition."""

        def commit() -> None:
            self.permit()
            try:
                request()
            except ClientError as error:
                status = status_of(error) if condition else 0
                if status == 412 or status == 409 and self.exists(name):  # some stores tell the loser of a race 409
                    raise _Taken from error
                if status == 501:
                    raise _Unsupported from error
                raise

        self._try(commit, name)

    def _try(self, request: Callable[[], T], name: str) -> T:
        def attempt() -> T:
            try:
                return request()
            except ERRORS as error:
                raise self._explained(error, name) from error

        return keep_trying(attempt, self.config, where=self.address(name))

    def _explained(self, error: Exception, name: str) -> Exception:
        answered = connection(self.config, os.getpid()).answered
        return explained(error, self._place(name), answered.is_set())

    def _place(self, name: str) -> S3Address:
        return S3Address(self.address(name), self.bucket, self._client.meta.endpoint_url)


class _Taken(Exception):
    """A conditional put found the name in use."""


class _Unsupported(Exception):
    """The store knows no conditional puts, or no deletion of many objects by one request."""


def _is_range(content_range: str, length: int, start: int, size: int | None) -> bool:
    """Whether an answer of `length` bytes is exactly the range that was asked for (size None: to the end)."""
    if not content_range:  # the whole object, which is right where no more than that was asked for
        return start == 0 and (size is None or length <= size)
    matched = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range)
    if matched is None:
        return False
    first, last, total = map(int, matched.groups())
    end = total if size is None else min(start + size, total)
    return (first, last + 1) == (start, end) and length == end - start


def _length(data: Data) -> int:
    return data.stat().st_size if isinstance(data, Path) else memoryview(data).nbytes


def _slice(data: Data, start: int, size: int) -> bytes:
    if isinstance(data, Path):
        with open(data, "rb") as file:
            file.seek(start)
            return file.read(size)
    return bytes(memoryview(data)[start : start + size])
