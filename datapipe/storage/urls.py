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
    _refuse_near_urls(url)
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
    _refuse_near_urls(url)
    if not url or is_remote(url):
        return url.rstrip("/")
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def resolved_url(url: str) -> str:
    """The url in the one form that tells places apart: a local path in full, links resolved."""
    url = full_url(url)
    return url if is_remote(url) else os.path.realpath(url)


SCHEMES = "s3a?|s3n|gs|gcs|az|abfss?|adl|hdfs|https?|ftp|sftp|ssh|file|memory"
_NEAR = re.compile(rf"[\s'\"]*({SCHEMES})(?:[:;.,\s]+[/\\]|[:;.,\s]*[/\\]{{2}}|:(?=[^/\\]))", re.IGNORECASE)
"""What was meant to be the address of an object store, and would be the name of a local file or folder."""
OTHER_NAMES = {"s3a": "s3", "s3n": "s3"}
"""How other programs call a scheme."""


def _refuse_near_urls(url: str) -> None:
    """What pathlib and normpath make of "s3://bucket" would be a folder called "s3:"; likewise other slips."""
    scheme, separator, rest = url.partition("://")
    if separator and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) and scheme not in OTHER_NAMES:
        if rest != rest.strip() or (scheme not in LOCAL and not re.match(r"[^/\s]", rest)):
            what = "blanks around it" if rest != rest.strip() else "no bucket or host"
            raise _near(f"the address has {what}", url, scheme, rest.strip().lstrip("/"))
        return
    if separator and not scheme:
        raise _near("the address has no scheme", url, "s3", rest)
    if scheme in OTHER_NAMES and separator:
        raise _near(f"the scheme {scheme} is another program's", url, OTHER_NAMES[scheme], rest)
    if separator and re.fullmatch(r"\s*[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise _near("a scheme is written in small letters, with nothing before it", url, scheme.strip().lower(), rest)
    if match := re.match(r"arn:aws[a-z-]*:s3:::(.*)", url):
        raise _near("this is the name of a resource, no address", url, "s3", match[1])
    if match := re.match(r"[A-Za-z]:[/\\]", url):
        raise StorageError("this is a path of Windows", where=url, hint="give it as this machine sees the folder")
    if match := (_NEAR.match(url) or re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", url)):
        scheme = match[1].lower()
        rest = url[match.end(1) :].lstrip(":;., /\\")
        raise _near("an address of an object store has two slashes", url, OTHER_NAMES.get(scheme, scheme), rest)


LOCAL = ("file", "local", "memory")


def _near(what: str, url: str, scheme: str, rest: str) -> StorageError:
    meant = f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest or 'bucket/prefix'}"
    local = "" if "://" in url else f"; for a local folder of that name, ./{url}"
    return StorageError(what, where=url, hint=f"{meant}{local}")
