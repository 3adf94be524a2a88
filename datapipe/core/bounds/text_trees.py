"""JSON and TOML that others wrote: what nests too deeply, or takes far more memory than bytes, is a ValueError."""

import json
import re
import tomllib
from typing import Any

FREE_VALUES = 1_000_000
"""Values of a JSON text that are taken whatever its size."""
BYTES_A_VALUE = 8
"""Beyond those, a text has at least so many bytes for each; an empty list takes 3, and 64 of memory."""
MOST_TOML_BYTES = 4 << 20
"""A recipe has some kB."""
MOST_KEY_PARTS = 64
"""Dots of a TOML key: the parser takes the square of their number."""

_LONG_KEY = re.compile(rf"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){{{MOST_KEY_PARTS}}}""")


def parse_json(text: bytes | str) -> Any:
    """What a JSON text says. Raises ValueError for what is none, nests too deeply, or has more values than its bytes
    allow."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    allowed = FREE_VALUES + len(data) // BYTES_A_VALUE
    if len(data) > FREE_VALUES and sum(data.count(start) for start in (b",", b"[", b"{")) > allowed:
        raise ValueError(f"it has more than {allowed:,} values in {len(data):,} bytes")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def parse_record(text: bytes | str) -> dict[str, Any]:
    """A JSON text that is an object; raises ValueError as `parse_json`, and for anything else."""
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError(f"it is of type {type(found).__name__}, not an object")
    return found


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text says. Raises ValueError (`tomllib.TOMLDecodeError` is one) for what is none, is too large, or
    nests too deeply."""
    if len(text) > MOST_TOML_BYTES:
        raise ValueError(f"it has {len(text):,} characters, a recipe has {MOST_TOML_BYTES:,} at most")
    if _LONG_KEY.search(text):
        raise ValueError(f"a key has more than {MOST_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
