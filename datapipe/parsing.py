"""Command lines of this package as settings."""

from typing import TypeVar

import tyro
from pydantic import ValidationError

from datapipe.errors import ConfigError

T = TypeVar("T")
PROGRAM = "python -m datapipe"


def parse(kind: type[T], arguments: list[str], name: str, *, program: str = PROGRAM) -> T:
    """The command line as settings. Values out of range become one ConfigError that lists them all."""
    try:
        return tyro.cli(kind, args=arguments, prog=f"{program} {name}")
    except ValidationError as error:
        wrong = [
            f"--{'.'.join(map(str, item['loc'])).replace('_', '-')}: {item['msg']}, not {item['input']!r}"
            for item in error.errors()
        ]
        raise ConfigError(
            "\n  ".join(["settings out of range", *wrong]), hint=f"{program} {name} --help says what they mean"
        ) from error
