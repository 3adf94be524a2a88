"""Where bytes live: a local folder, an S3 prefix, or any other scheme through fsspec. The only place with retries."""

from datapipe.storage.address import is_remote, open_store, split_url
from datapipe.storage.store import Data, Entry, Store
from datapipe.storage.streams import open_stream

__all__ = ["Data", "Entry", "Store", "is_remote", "open_store", "open_stream", "split_url"]
