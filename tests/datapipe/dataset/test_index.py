"""Columns of an index as single arrays, however many rows there are and however they are cut."""

import numpy as np
import pyarrow
import pytest

from datapipe.dataset.index import content_words, whole_column


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_content_words__of_rows_cut_anywhere(rows: int) -> None:
    hashes = np.random.default_rng(0).bytes(32 * (rows + 2))
    column = pyarrow.array([hashes[start : start + 32] for start in range(0, len(hashes), 32)], pyarrow.binary(32))
    wanted = np.frombuffer(hashes, np.uint64).reshape(-1, 4)[1 : 1 + rows, :2]
    half = rows // 2
    for chunks in ([column.slice(1, rows)], [column.slice(1, half), column.slice(1 + half, rows - half)]):
        table = pyarrow.table({"sha256": pyarrow.chunked_array(chunks)})
        assert np.array_equal(content_words(table), wanted)


def test_whole_column__has_room_for_the_keys_of_more_than_67_million_crops() -> None:
    """Text with 32-bit offsets ends at 2 GiB: joining chunks beyond that fails."""
    table = pyarrow.table({"key": pyarrow.chunked_array([["a", None], ["b"]]), "size": [1, 2, 3]})
    assert whole_column(table, "key").equals(pyarrow.array(["a", None, "b"], pyarrow.large_string()))
    assert whole_column(table, "size").equals(pyarrow.array([1, 2, 3]))
