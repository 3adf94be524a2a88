"""Runs inside the peers' own environment: `python peer_process.py PEER`; imports nothing of ours.

Each line on stdin names a folder and, after a tab, a new one: all JPEGs below the first are written into the second as
WebDataset tars by the library, and a line with their number is printed. The process stays, so that starting it and
importing the library is not measured. No library encodes anything anew.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[[list[Path], Path], None]


def img2dataset(*, lean: bool) -> Write:
    """The library's reader, downloader and writer in one process; sha256, as by default.

    `lean`: as little as it can do, and quickest here: nothing is decoded, no EXIF is read, one thread. Otherwise its
    defaults, but without encoding: every image is decoded once.
    """
    from img2dataset.downloader import Downloader
    from img2dataset.reader import Reader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    per_shard = 10_000
    resizer = Resizer(image_size=256, resize_mode="no", resize_only_if_bigger=False, skip_reencode=not lean,
                      disable_all_reencoding=lean)  # fmt: skip

    def write(files: list[Path], out: Path) -> None:
        urls = out / "urls.txt"
        urls.write_text("".join(f"file://{file}\n" for file in files))
        (out / "_tmp").mkdir()
        reader = Reader(str(urls), "txt", "url", None, None, None, None, per_shard, set(), str(out / "_tmp"))
        download = Downloader(
            sample_writer_class=WebDatasetSampleWriter, resizer=resizer, thread_count=1 if lean else 256,
            save_caption=False, extract_exif=not lean, output_folder=str(out), column_list=reader.column_list,
            timeout=10, number_sample_per_shard=per_shard, oom_shard_count=5, compute_hash="sha256",
            verify_hash_type=None, encode_format="jpg", retries=0, user_agent_token=None,
            disallowed_header_directives=None)  # fmt: skip
        if not all(done for done, _ in map(download, reader)):
            raise RuntimeError("img2dataset has left a shard out")

    return write


def ray_data() -> Write:
    """`read_binary_files` -> `write_webdataset`, on as many CPUs as there are."""
    import ray.data

    ray.init(address="local", include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False,
             logging_level="ERROR")  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False

    def name(batch: Any) -> Any:
        import pyarrow

        keys = [os.path.basename(path).removesuffix(".jpg") for path in batch["path"].to_pylist()]
        return pyarrow.table({"__key__": keys, "jpg": batch["bytes"]})

    def write(files: list[Path], out: Path) -> None:
        crops = ray.data.read_binary_files(list(map(str, files)), include_paths=True)
        crops.map_batches(name, batch_format="pyarrow").write_webdataset(str(out), encoder=None)

    return write


PEERS: dict[str, Callable[[], Write]] = {
    "img2dataset": lambda: img2dataset(lean=True),
    "img2dataset_defaults": lambda: img2dataset(lean=False),
    "ray_data": ray_data,
}


def main() -> None:
    """Answer until stdin ends. Answers go to the first stdout; what the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    write = PEERS[sys.argv[1]]()
    for line in sys.stdin:
        source, out = map(Path, line.rstrip("\n").split("\t"))
        files = sorted(source.rglob("*.jpg"))
        out.mkdir(parents=True)
        write(files, out)
        print(len(files), file=answers, flush=True)


if __name__ == "__main__":
    main()
