"""The command line: how commands begin and end, their flags, their help, their mistakes."""

from datapipe.core.cli.dispatch import Command, dispatch, parse, run, show_help, version
from datapipe.core.cli.flags import INLINE, POSITIONAL, REPEATED, Arg, Flag, flags_of, read, read_some, unknown
from datapipe.core.cli.usage import Page, page_of, wants_help
from datapipe.core.stop_signals import COMPLETE, FAILED, INTERRUPTED, STOPPED, USAGE

__all__ = [
    "COMPLETE",
    "FAILED",
    "INLINE",
    "INTERRUPTED",
    "POSITIONAL",
    "REPEATED",
    "STOPPED",
    "USAGE",
    "Arg",
    "Command",
    "Flag",
    "Page",
    "dispatch",
    "flags_of",
    "page_of",
    "parse",
    "read",
    "read_some",
    "run",
    "show_help",
    "unknown",
    "version",
    "wants_help",
]
