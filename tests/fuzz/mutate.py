"""Seeded changes to files: bytes flipped, cut, doubled and overwritten; nodes of JSON replaced by extreme ones."""

import json
from collections.abc import Sequence
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 32_767, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
"""What is put in place of numbers of 1, 2, 4 and 8 bytes."""
EXTREMES: tuple[Any, ...] = (
    None, True, [], {}, "", 0, -1, 1, 10**9, 2**63 - 1, 2**63, 10**30, 1e308, float("inf"), float("nan"), -0.5,
    "x" * 300, "\x1b[31m\x07", "../../etc/x", "/etc/x", "\ud800", [[[[[[[[]]]]]]]], {"a": {"b": {"c": None}}},
    [None] * 50, "9" * 5_000,
)  # fmt: skip
MOST_CHANGES = 4


def mutated(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """The data with a few changes; `others`: files of the kind that pieces may come from."""
    for _ in range(random.randint(1, MOST_CHANGES)):
        data = random.choice(_CHANGES)(data or b"\0", others, random)
    return data


def mutated_json(text: bytes, random: Random) -> bytes:
    """A JSON text with a few of its nodes changed, or bytes of it where it is none."""
    try:
        tree = json.loads(text)
    except ValueError:
        return mutated(text, (text,), random)
    for _ in range(random.randint(1, MOST_CHANGES)):
        tree = _replaced(tree, random)
    return json.dumps(tree).encode()


def _replaced(tree: Any, random: Random) -> Any:
    """The tree with one node replaced, taken away, renamed or doubled."""
    if not isinstance(tree, dict | list) or not tree or random.random() < 0.05:
        return deepcopy(random.choice(EXTREMES))  # later changes are of the copy
    keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = random.choice(keys)
    if isinstance(tree[key], dict | list) and tree[key] and random.random() < 0.7:
        tree[key] = _replaced(tree[key], random)
        return tree
    change = random.randrange(6)
    if change == 0:
        del tree[key]
    elif change == 1 and isinstance(tree, dict):
        tree[random.choice(("", "x" * 99, "\x1b]0;x\x07", "__class__"))] = tree.pop(key)
    elif change == 2 and isinstance(tree, list):
        tree.insert(0, tree[key])
    elif change == 3 and isinstance(tree[key], int | float) and not isinstance(tree[key], bool):
        tree[key] = random.choice((tree[key] + 1, -tree[key], tree[key] * 10**6, random.choice(NUMBERS)))
    else:
        tree[key] = deepcopy(random.choice(EXTREMES))
    return tree


def _flip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _number(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    size = random.choice((1, 2, 4, 8))
    number = random.choice(NUMBERS) % (1 << 8 * size)
    place = random.randrange(len(data))
    return data[:place] + number.to_bytes(size, random.choice(("little", "big"))) + data[place + size :]


def _cut(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    return data[: random.randrange(len(data))] if random.random() < 0.7 else data[random.randrange(len(data)) :]


def _drop(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    start = random.randrange(len(data))
    return data[:start] + data[start + random.randint(1, 64) :]


def _double(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    start, size = random.randrange(len(data)), random.randint(1, 600)
    return data[: start + size] + data[start : start + size] * random.randint(1, 20) + data[start + size :]


def _splice(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(others) if others else data
    start, place, size = random.randrange(len(other) or 1), random.randrange(len(data)), random.randint(1, 2_000)
    return data[:place] + other[start : start + size] + data[place + (size if random.random() < 0.5 else 0) :]


def _fill(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    start, size = random.randrange(len(data)), random.randint(1, 200)
    return data[:start] + bytes([random.choice((0, 0x20, 0x41, 0x5B, 0x7F, 0xFF))]) * size + data[start + size :]


_CHANGES = (_flip, _flip, _number, _number, _cut, _drop, _double, _splice, _fill)
