"""What every configuration class is: a frozen, keyword-only pydantic dataclass that refuses unknown keys.

A literal under each field says its meaning, unit and when to change it; it becomes the help of the command line.
"""

from typing import TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Class decorator: `@settings class ShardConfig: ...`."""
    made = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", validate_default=True))(cls)
    return cast(type[T], made)
