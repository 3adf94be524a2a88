"""Where bytes live: a local folder, an S3 prefix, or any other scheme through fsspec. The only place with retries.

address.py   which store an address means          store.py    what every store promises
local.py     folders                               retry.py    the loop that tries again
s3.py        S3 (s3_client.py, s3_faults.py)       streams.py  objects as seekable files
schemes.py   everything fsspec knows               probe.py    what a store can do
"""

from datapipe.storage.address import full_url, is_remote, open_store, split_url
from datapipe.storage.probe import Capabilities, probe
from datapipe.storage.store import Data, Entry, Store, unsafe
from datapipe.storage.streams import open_object, open_stream

__all__ = [
    "Capabilities",
    "Data",
    "Entry",
    "Store",
    "full_url",
    "is_remote",
    "open_object",
    "open_store",
    "open_stream",
    "probe",
    "split_url",
    "unsafe",
]
