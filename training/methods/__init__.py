"""The methods, one file each. Nothing but this package knows their names: what others need of one it is asked for."""

from training.methods.registry import (
    DEFAULT,
    GROUP,
    absent_hint,
    build,
    default_settings,
    entry_point_of,
    fusion,
    known,
    named,
    of,
    package_of,
    quoted_feature,
    read_settings,
    settings_union,
)

__all__ = [
    "DEFAULT",
    "GROUP",
    "absent_hint",
    "build",
    "default_settings",
    "entry_point_of",
    "fusion",
    "known",
    "named",
    "of",
    "package_of",
    "quoted_feature",
    "read_settings",
    "settings_union",
]
