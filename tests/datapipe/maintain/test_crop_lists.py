"""Lists are read as editors, spreadsheets and shells write them, and names mean the crops that a person would say."""

import bz2
import gzip
import json
import lzma
import pickle
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.maintain.crop_lists import By, look_up, read_list, refuse_ambiguous, refuse_missing

STORAGE = StorageConfig()
NAMES = ["0001_c1.jpg", "é/0002.jpg", "日本.jpg"]
TEXT = "\n".join(NAMES)


def read(tmp_path: Path, data: bytes, *, by: By = "name", name: str = "list.txt") -> list[str]:
    (tmp_path / name).write_bytes(data)
    return read_list(f"{tmp_path}/{name}", by, STORAGE).to_pylist()


ENCODED = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "utf-16 le": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "utf-16 be": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "utf-16 le without a mark": TEXT.encode("utf-16-le"),
    "utf-16 be without a mark": TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "windows lines": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode() + b"\r\n",
    "old mac lines": TEXT.replace("\n", "\r").encode() + b"\r",
    "blank lines and blanks around": f"\n  {NAMES[0]} \t\n\n\t{NAMES[1]}\u00a0\n{NAMES[2]}   \n\n".encode(),
    "quotes": "\n".join(f'"{name}"' for name in NAMES).encode(),
    "single quotes": "\n".join(f"'{name}'" for name in NAMES).encode(),
    "csv": ("id,name,pid\n" + "".join(f'{row},"{name}",7\n' for row, name in enumerate(NAMES))).encode(),
    "csv of excel": ("\ufeffName;Person\r\n" + "".join(f"{name};7\r\n" for name in NAMES)).encode(),
    "tsv": ("pid\tname\n" + "".join(f"7\t{name}\n" for name in NAMES)).encode(),
    "gzip": gzip.compress(TEXT.encode()),
    "bzip2": bz2.compress(TEXT.encode()),
    "xz": lzma.compress(b"\xef\xbb\xbf" + TEXT.encode()),
}


@pytest.mark.parametrize("how", ENCODED)
def test_list__is_read_however_it_was_saved(tmp_path: Path, how: str) -> None:
    listed = pyarrow.array(read(tmp_path, ENCODED[how]), pyarrow.large_string())
    found = look_up(listed, pyarrow.table({"name": [*NAMES, "other.jpg"]}), "name")
    assert found.place.tolist() == [*(listed.to_pylist().index(line) for line in listed.to_pylist()), -1]
    assert (found.missing, found.remarks) == (0, 0)


def test_list__as_parquet_and_pickle(tmp_path: Path) -> None:
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        pyarrow.parquet.write_table(
            pyarrow.table({"name": pyarrow.array([*NAMES, None]).cast(kind)}), tmp_path / "x.parquet"
        )
        assert read_list(f"{tmp_path}/x.parquet", "name", STORAGE).to_pylist() == NAMES
    assert read(tmp_path, (tmp_path / "x.parquet").read_bytes(), name="x.list") == NAMES
    pickled = pickle.dumps([NAMES[0], NAMES[1].encode(), "\udcff.jpg"])
    assert read(tmp_path, pickled, name="x.pkl") == [NAMES[0], NAMES[1], "\\xff.jpg"]
    assert read(tmp_path, b"\xff.jpg\n") == ["\\xff.jpg"]
    no_text = pyarrow.array([b"\xff.jpg"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"name": no_text}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no parquet file with a column `name` of text"):
        read_list(f"{tmp_path}/x.parquet", "name", STORAGE)
    pyarrow.parquet.write_table(pyarrow.table({"name": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no parquet file with a column `name` of text"):
        read_list(f"{tmp_path}/x.parquet", "name", STORAGE)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf\r\n \t\r\n", "empty"),
        (b"PK\x03\x04" + bytes(20), "a zip or a spreadsheet"),
        (b"\x00\x01\x02\x03\xff" * 9, "control character"),
        (b"\xff\xfea\0b", "no whole UTF-16"),
        (gzip.compress(b"a", mtime=0)[:-4], "cannot be unpacked"),
        (b"\xff\xd8\xff\xe0", "a JPEG"),
    ],
    ids=["nothing", "blanks", "spreadsheet", "binary", "cut utf-16", "cut gzip", "image"],
)
def test_list__that_is_none_is_an_error(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path, data)
    assert caught.value.where == f"{tmp_path}/list.txt"


CROPS = ["a/0001_c1.jpg", "b/0002_c1.jpg", "Zoé/0003.jpg", " 0004 .jpg", "b\\0005.jpg", "n\\xff.png"]


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("a/0001_c1.jpg", 0), ("./a/0001_c1.jpg", 0), ("././a//0001_c1.jpg", 0), ("/data/set/a/0001_c1.jpg", 0),
        ("a\\0001_c1.jpg", 0), (".\\a\\0001_c1.jpg", 0), ("C:\\data\\a\\0001_c1.jpg", 0), ("0001_c1.jpg", 0),
        ("0001_c1", 0), ("x/0002_c1.png", 1), (unicodedata.normalize("NFC", "Zoé/0003.jpg"), 2),
        (unicodedata.normalize("NFD", "Zoé/0003.jpg"), 2), ("\ufeffZoé/0003.jpg", 2), ("0004 .jpg", 3),
        ("b/0005.jpg", 4), ("b\\0005.jpg", 4), ("n\\xff.png", 5),
    ],
)  # fmt: skip
def test_look_up__finds_a_name_however_it_is_spelt(line: str, row: int) -> None:
    for names in (CROPS, [unicodedata.normalize("NFD", name) for name in CROPS]):
        found = look_up(pyarrow.array([line], pyarrow.large_string()), pyarrow.table({"name": names}), "name")
        assert [place for place, at in enumerate(found.place) if at == 0] == [row] and not found.missing


def test_look_up__keys_in_any_spelling() -> None:
    keys = [f"{number:032x}" for number in range(200, 203)]
    lines = [keys[0].upper(), f"{keys[1]}.jpg", f" shards/x/{keys[2]}.JPG", "no key", keys[0]]
    found = look_up(pyarrow.array(lines, pyarrow.large_string()), pyarrow.table({"key": keys}), "key")
    assert found.place.tolist() == [0, 1, 2] and found.examples == ["no key"]


def test_look_up__comments_and_a_heading_are_no_crops_unless_there_are_such() -> None:
    lines = pyarrow.array(["name", "# asked for on Monday", "#", "a.jpg", "#1.jpg", "name"], pyarrow.large_string())
    found = look_up(lines, pyarrow.table({"name": ["a.jpg", "b.jpg"]}), "name")
    assert (found.remarks, found.missing, found.lost.to_pylist()) == (3, 2, ["#1.jpg", "name"])
    names = ["a.jpg", "name.jpg", "# asked for on Monday.jpg", "#1.jpg"]
    found = look_up(lines, pyarrow.table({"name": names}), "name")
    assert (found.remarks, found.missing) == (1, 0) and (found.place >= 0).all()


def test_refuse_ambiguous__only_what_a_person_would_call_differently() -> None:
    both = ["é.jpg", unicodedata.normalize("NFD", "é.jpg"), "é.jpg "]
    listed = pyarrow.array(["é.jpg"], pyarrow.large_string())
    table = pyarrow.table({"name": both, "source": ["a"] * 3})
    found = look_up(listed, table, "name")
    assert found.place.tolist() == [0, 0, 0] and refuse_ambiguous(found.place, listed, table, "--names") == 2
    for other in (
        pyarrow.table({"name": both, "source": ["a", "b", "a"]}),
        pyarrow.table({"name": ["x/é.jpg", "y/é.jpg"], "source": ["a", "a"]}),
    ):
        found = look_up(listed, other, "name")
        with pytest.raises(DataError, match="1 listed names fit more than one crop, for example é.jpg"):
            refuse_ambiguous(found.place, listed, other, "--names")


def test_refuse_missing__counts_and_shows_the_first() -> None:
    listed = pyarrow.array(["a", "b", "c", "d", "e"], pyarrow.large_string())
    found = look_up(listed, pyarrow.table({"name": ["a"]}), "name")
    refuse_missing(found, 5, share=0.8, where="x")
    with pytest.raises(DataError, match="4 of the 5 listed crops are not in the data set, for example b, c, d"):
        refuse_missing(found, 5, share=0.79, where="x")
    assert json.loads(json.dumps(found.examples)) == ["b", "c", "d"]
