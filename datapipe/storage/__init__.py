"""Where bytes live: a local folder, an S3 prefix, or any other scheme through fsspec. The only place with retries.

store.py         what every store promises
urls.py          which store an address means
local.py         folders
s3.py            S3, with s3_client.py, s3_errors.py and, for reads, s3_obstore.py
fsspec_store.py  everything fsspec knows
retry.py         the loop that tries again
file_objects.py  objects as seekable files
probe.py         what a store can do
"""

from datapipe.storage.file_objects import open_object, open_stream
from datapipe.storage.probe import Capabilities, probe
from datapipe.storage.store import Children, Data, Entry, Store, unsafe
from datapipe.storage.urls import full_url, is_remote, open_store, resolved_url, split_url

__all__ = [
    "Capabilities",
    "Children",
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
