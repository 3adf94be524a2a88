"""Where bytes live: a local folder, an S3 prefix, or any other scheme through fsspec. The only place with retries.

    store.py       what every store promises
    address.py     which store an address means
    local.py       folders
    s3.py          S3, with s3_client.py, s3_faults.py and, for reads, s3_ranges.py
    schemes.py     everything fsspec knows
    retry.py       the loop that tries again
    streams.py     objects as seekable files
    probe.py       what a store can do
"""

from datapipe.storage.address import full_url, is_remote, open_store, resolved_url, split_url
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
    "resolved_url",
    "split_url",
    "unsafe",
]
