"""Which store an address means."""

import os
import re

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from datapipe.storage.fsspec_store import FsspecStore
from datapipe.storage.local import LocalStore
from datapipe.storage.store import Store


def open_store(url: str, config: StorageConfig = StorageConfig()) -> Store:  # noqa: B008  (frozen)
    """The store behind "s3://bucket/prefix", a local path, or any URL fsspec knows. Touches nothing yet."""
    if not url:
        raise StorageError("an empty path is no place to read or write", hint="give a folder or s3://bucket/prefix")
    _refuse_one_slash(url)
    scheme, _, rest = url.rpartition("://")
    if scheme in ("", "file"):
        return LocalStore(rest)
    if scheme == "s3":
        from datapipe.storage.s3 import S3Store  # boto3 takes a third of a second that local runs do without

        return S3Store(url, config)
    return FsspecStore(url, config)


def split_url(url: str) -> tuple[str, str]:
    """(folder url, last name): "s3://b/p/x.tar" -> ("s3://b/p", "x.tar"); "x.tar" -> (".", "x.tar")."""
    head, slash, name = url.rstrip("/").rpartition("/")
    return head or ("/" if slash else "."), name


def is_remote(url: str) -> bool:
    """Whether the url is anything but a path on this machine."""
    return "://" in url and not url.startswith("file://")


def full_url(url: str) -> str:
    """The url as it means the same in every working directory: a local path in full, links as they are."""
    _refuse_one_slash(url)
    if not url or is_remote(url):
        return url.rstrip("/")
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def resolved_url(url: str) -> str:
    """The url in the one form that tells places apart: a local path in full, links resolved."""
    url = full_url(url)
    return url if is_remote(url) else os.path.realpath(url)


def _refuse_one_slash(url: str) -> None:
    """What pathlib and normpath make of "s3://bucket" would be a folder called "s3:"."""
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", url):
        scheme, rest = match[1], url[match.end() :]
        raise StorageError(
            "an address of an object store has two slashes",
            where=url,
            hint=f"{scheme}://{rest}; for a local folder of that name, ./{url}",
        )
