"""Where bytes live: a local folder, an S3 prefix, or any other scheme through fsspec. The only file with retries.

Names are relative to the store and '/'-separated. What `create` and `replace` write is whole under its name or not
there at all; a reader never meets half an object. Every fault becomes a `StorageError` that names the address.
"""

import io
import logging
import os
import random
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from datapipe.config import StorageConfig
from datapipe.errors import NotFoundError, StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")
Data = bytes | bytearray | memoryview | Path
"""What can be written: bytes in memory, or a local file that is streamed."""

FIRST_WAIT_S = 0.2
CONNECT_TIMEOUT_S = 10.0
PART_BYTES = 16 << 20
"""Size of the parts of a multipart upload; larger data than four of them is sent in parts."""
MOST_PARTS = 9_000
PARTS_IN_FLIGHT = 4
STREAM_BYTES = 8 << 20
"""Bytes that `open_stream` asks for at a time."""
TEMPORARY = ".part"
"""Ending of files that are still being written; listings leave them out."""


class Entry(NamedTuple):
    """One file or object: its name within the store and its size in bytes."""

    name: str
    size: int


class Store(ABC):
    """One folder or prefix. Cheap to make, safe to share between threads, picklable."""

    url: str

    @abstractmethod
    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Bytes [start, start + size) of an object; fewer only where it ends. Raises NotFoundError."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of an object. Raises NotFoundError."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Everything below whose name starts with `prefix`, sorted by name, as it is found.

        Raises NotFoundError where the folder or bucket itself is missing; an S3 prefix without objects is just empty.
        """

    @abstractmethod
    def create(self, name: str, data: Data) -> bool:
        """Write an object that is not there yet; False, and nothing written, when it is.

        False may also mean that a try of this very call had succeeded and its answer was lost: compare the content.
        """

    @abstractmethod
    def replace(self, name: str, data: Data) -> None:
        """Write an object whether it is there or not."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; one that is absent is fine."""

    @abstractmethod
    def at(self, *parts: str) -> "Store":
        """The store of a sub-folder."""

    def exists(self, name: str) -> bool:
        """Whether an object of this name is there."""
        try:
            self.size(name)
        except NotFoundError:
            return False
        return True

    def address(self, name: str) -> str:
        """The full path or URL of an object, for messages."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url


def open_store(url: str, config: StorageConfig = StorageConfig()) -> Store:  # noqa: B008  (frozen)
    """The store behind "s3://bucket/prefix", a local path, or any URL fsspec knows. Touches nothing yet."""
    if not url:
        raise StorageError("an empty path is no place to read or write", hint="give a folder or s3://bucket/prefix")
    scheme, _, rest = url.rpartition("://")
    if scheme in ("", "file"):
        return LocalStore(rest)
    if scheme == "s3":
        return S3Store(url, config)
    return SchemeStore(url)


def split_url(url: str) -> tuple[str, str]:
    """(folder url, last name): "s3://b/p/x.tar" -> ("s3://b/p", "x.tar"); "x.tar" -> (".", "x.tar")."""
    head, slash, name = url.rstrip("/").rpartition("/")
    return head or ("/" if slash else "."), name


def is_remote(url: str) -> bool:
    """Whether the url is anything but a path on this machine."""
    return "://" in url and not url.startswith("file://")


def open_stream(url: str, mode: str = "rb", bufsize: int = STREAM_BYTES,
                config: StorageConfig = StorageConfig()) -> BinaryIO:  # noqa: B008  (frozen)
    """An object as a readable file, fetched in large blocks with the retries of this module.

    It has the signature of webdataset's openers, so that its library reads shards on S3:
    `from webdataset.gopen import gopen_schemes; gopen_schemes["s3"] = open_stream` (endpoint by AWS_ENDPOINT_URL, or
    `functools.partial(open_stream, config=StorageConfig(endpoint_url=...))`).
    """
    if mode != "rb":
        raise StorageError(f"streams are for reading, not {mode!r}", where=url)
    folder, name = split_url(url)
    store = open_store(folder, config)
    return io.BufferedReader(_Blocks(store, name), max(bufsize, STREAM_BYTES))


class _Blocks(io.RawIOBase):
    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.total, self.position = store.size(name), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._next(len(buffer))
        buffer[:len(block)] = block
        return len(block)

    def readall(self) -> bytes:  # the inherited one would ask for 8 kB at a time
        return b"".join(iter(lambda: self._next(STREAM_BYTES), b""))

    def _next(self, most: int) -> bytes:
        wanted = min(most, self.total - self.position)
        block = self.store.read(self.name, start=self.position, size=wanted)
        if len(block) != wanted:
            raise StorageError("the object became shorter while it was read", where=self.store.address(self.name))
        self.position += wanted
        return block


# ---------------------------------------------------------------------------------------------------- local folders


class LocalStore(Store):
    """A folder. Created on the first write."""

    def __init__(self, path: str) -> None:
        self.url = os.path.expanduser(path)

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        with self._faults(name), open(self._path(name), "rb", buffering=0) as file:
            if start:
                file.seek(start)
            return file.readall() if size is None else _read_fully(file, size)

    def size(self, name: str) -> int:
        with self._faults(name):
            path = self._path(name)
            if path.is_dir():
                raise FileNotFoundError(path)
            return path.stat().st_size

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._faults(""):
            if not os.path.isdir(self.url):
                raise NotADirectoryError(self.url) if os.path.exists(self.url) else FileNotFoundError(self.url)
        folder = prefix.rpartition("/")[0]
        if os.path.isdir(self._path(folder)):
            start = folder + "/" if folder else ""
            yield from self._walk(start, prefix, (os.path.realpath(self._path(folder)),))

    def _walk(self, folder: str, prefix: str, parents: tuple[str, ...]) -> Iterator[Entry]:
        with self._faults(folder), os.scandir(self._path(folder)) as scan:
            found = sorted((f"{folder}{item.name}{'/' if item.is_dir() else ''}", item) for item in scan)
        for name, item in found:  # "a.b" < "a/b": a folder sorts with its slash, so that full names come out sorted
            if not (name.startswith(prefix) or prefix.startswith(name)) or name.endswith(TEMPORARY):
                continue
            if not name.endswith("/"):
                with self._faults(name):
                    yield Entry(name, item.stat().st_size)
            elif (real := os.path.realpath(item.path)) not in parents:  # a link to a folder above would never end
                yield from self._walk(name, prefix, (*parents, real))

    def create(self, name: str, data: Data) -> bool:
        with self._faults(name), self._whole(name, data) as temporary:
            try:
                os.link(temporary, self._path(name))
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if self._path(name).exists():
                    return False
                os.replace(temporary, self._path(name))
            return True

    def replace(self, name: str, data: Data) -> None:
        with self._faults(name), self._whole(name, data) as temporary:
            os.replace(temporary, self._path(name))

    def delete(self, name: str) -> None:
        path = self._path(name)
        with self._faults(name):
            path.unlink(missing_ok=True)
        if "/" in name:
            with suppress(OSError):  # object stores have no empty folders either
                path.parent.rmdir()

    def at(self, *parts: str) -> Store:
        return LocalStore(os.path.join(self.url, *parts))

    def _path(self, name: str) -> Path:
        return Path(self.url, name)

    @contextmanager
    def _whole(self, name: str, data: Data) -> Iterator[Path]:
        """A complete, synced file beside the final one; the folder is synced after the caller has named it."""
        folder = self._path(name).parent
        temporary = folder / f".{self._path(name).name}.{secrets.token_hex(6)}{TEMPORARY}"
        try:
            with _new_file(temporary) as file:
                if isinstance(data, Path):
                    with open(data, "rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            what = "the file does not exist" if name else "the folder does not exist"
            raise NotFoundError(what, where=self.address(name), hint="check the path for a typing mistake") from error
        except NotADirectoryError as error:
            raise NotFoundError("this is not a folder", where=self.address(name),
                                hint="give the folder, not a file in it") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(f"the file system refused: {reason}", where=self.address(name),
                               hint="check the permissions and the free space there") from error


def _new_file(path: Path) -> BinaryIO:
    """A new file for writing, and its folder. A second try where somebody removed the empty folder in between."""
    for last in (False, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return open(path, "xb")
        except FileNotFoundError:
            if last:
                raise
    raise AssertionError("unreachable")


def _read_fully(file: io.FileIO, size: int) -> bytes:
    parts = []
    while size > 0 and (part := file.read(size)):  # one read gives at most 2 GiB
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# --------------------------------------------------------------------------------------------------------------- S3

TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException",
                   "InternalError", "ServiceUnavailable", "BadDigest", "XAmzContentSHA256Mismatch"}
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
        return self._try(lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(name)),
                         name)["ContentLength"]

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
        self._try(lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=body, **condition),
                  name, conditional=bool(condition))

    def _put_parts(self, name: str, data: Data, total: int, condition: dict[str, str]) -> None:
        """A multipart upload: invisible until it is completed, aborted when anything fails."""
        target = {"Bucket": self.bucket, "Key": self._key(name)}
        upload = self._try(lambda: self._client.create_multipart_upload(**target), name)["UploadId"]
        size = max(PART_BYTES, -(-total // MOST_PARTS))

        def send(number: int) -> dict[str, Any]:
            body = _slice(data, number * size, size)
            answer = self._try(lambda: self._client.upload_part(**target, UploadId=upload, PartNumber=number + 1,
                                                                Body=body), name)
            checksums = {key: value for key, value in answer.items() if key.startswith("Checksum")}
            return {"PartNumber": number + 1, "ETag": answer["ETag"],
                    **{key: value for key, value in checksums.items() if key != "ChecksumType"}}

        try:
            with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
                parts = list(pool.map(send, range(-(-total // size))))
            self._try(lambda: self._client.complete_multipart_upload(
                **target, UploadId=upload, MultipartUpload={"Parts": parts}, **condition),
                name, conditional=bool(condition))
        except BaseException:
            self._try(lambda: self._client.abort_multipart_upload(**target, UploadId=upload), name, absent_is_fine=True)
            raise

    def _try(self, request: Callable[[], T], name: str, *, conditional: bool = False,
             absent_is_fine: bool = False) -> T:
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
            log.warning("%s: %s; try %d of %d follows in %.1f s", self.address(name), reason, attempt + 1,
                        self.config.attempts, wait)
            time.sleep(wait)
        raise AssertionError("the loop above returns or raises")

    def _refusal(self, error: Exception, name: str) -> StorageError:
        status, code = _status(error), _code(error)
        where = f"{self.address(name)} at {self._endpoint()}"
        if code == "NoSuchBucket":
            return StorageError(f"the bucket {self.bucket!r} does not exist", where=where,
                                hint="check the bucket's name and the endpoint (--storage.endpoint-url); "
                                     "buckets are not made here")
        if status == 403:
            return StorageError(f"the store refuses access ({code})", where=where,
                                hint="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile) and the "
                                     "rights to read, list and write there")
        if status == 404:
            return NotFoundError("the object does not exist", where=where, hint="check the address")
        message = error.response["Error"].get("Message") or code  # type: ignore[attr-defined]
        return StorageError(f"the store answered {status}: {message}", where=where,
                            hint="a store that is busy or failing: run the same command again later")

    def _silence(self, error: Exception, name: str, attempts: int) -> StorageError:
        return StorageError(f"the store cannot be reached ({attempts} tries): {error}",
                            where=f"{self.address(name)} at {self._endpoint()}",
                            hint="check the endpoint (--storage.endpoint-url or AWS_ENDPOINT_URL) and the network")

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
    options = Config(retries={"total_max_attempts": 1}, max_pool_connections=32, read_timeout=config.timeout_s,
                     connect_timeout=min(CONNECT_TIMEOUT_S, config.timeout_s),
                     request_checksum_calculation=config.checksums, response_checksum_validation=config.checksums)
    return session.client("s3", endpoint_url=config.endpoint_url or None, config=options,
                          region_name=session.region_name or "us-east-1")


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
    return bytes(memoryview(data)[start:start + size])


# ------------------------------------------------------------------------------------------------- any other scheme

WHOLE_PUTS = {"memory", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
"""Schemes whose puts are whole or absent by themselves; elsewhere a temporary name is written and moved."""


class SchemeStore(Store):
    """Any URL scheme that fsspec knows. Create-once is a look followed by a write: enough for one committer."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = url.partition("://")[0]

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        with self._faults(name):
            return self._system.cat_file(self._path(name), start=start, end=None if size is None else start + size)

    def size(self, name: str) -> int:
        with self._faults(name):
            facts = self._system.info(self._path(name))
            if facts["type"] == "directory":
                raise FileNotFoundError(name)
            return int(facts["size"])

    def list(self, prefix: str = "") -> Iterator[Entry]:
        root = self._path("").rstrip("/") + "/"
        with self._faults(""):
            self._system.invalidate_cache()
            found = self._system.find(root, detail=True) if self._system.exists(root) else {}
        for path in sorted(found):
            name = path[path.index(root.strip("/")) + len(root.strip("/")) + 1:]
            if name.startswith(prefix) and not name.endswith(TEMPORARY):
                yield Entry(name, int(found[path]["size"]))

    def create(self, name: str, data: Data) -> bool:
        if self.exists(name):
            return False
        self.replace(name, data)
        return True

    def replace(self, name: str, data: Data) -> None:
        final = self._path(name)
        target = final if self.scheme in WHOLE_PUTS else f"{final}.{secrets.token_hex(6)}{TEMPORARY}"
        with self._faults(name):
            self._system.makedirs(final.rpartition("/")[0], exist_ok=True)
            if isinstance(data, Path):
                self._system.put_file(str(data), target)
            else:
                self._system.pipe_file(target, bytes(data))
            if target != final:
                self._system.mv(target, final)

    def delete(self, name: str) -> None:
        with self._faults(name):
            if self._system.exists(self._path(name)):
                self._system.rm_file(self._path(name))

    def at(self, *parts: str) -> Store:
        return SchemeStore("/".join((self.url, *parts)))

    @property
    def _system(self) -> Any:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            raise StorageError(f"no way to open {self.scheme}:// addresses: {error}", where=self.url,
                               hint="install fsspec's package for this scheme, or use a path or s3://") from error

    def _path(self, name: str) -> str:
        path = self._system._strip_protocol(self.url)
        return f"{path}/{name}" if name else path

    @contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError("the file does not exist", where=self.address(name),
                                hint="check the address") from error
        except OSError as error:
            raise StorageError(f"the store refused: {error}", where=self.address(name),
                               hint="check the address, the rights and the network") from error
