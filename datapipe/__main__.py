"""python -m datapipe shard | verify | stats | select | reshard | remove | preview | synth"""

import logging
import sys

from datapipe.core import cli
from datapipe.core.cli import Command

COMMANDS = {
    "shard": Command(
        "datapipe.commands.ingest:shard",
        "Turn crops into WebDataset tars with index and manifest; goes on where a killed run stopped.",
    ),
    "verify": Command(
        "datapipe.commands.inspect:verify",
        "Check a data set against its manifest and name what is wrong; exits with 1 if anything is.",
    ),
    "stats": Command(
        "datapipe.commands.inspect:stats",
        "Say what a data set holds: counts, sizes, duplicates, per source.",
    ),
    "select": Command(
        "datapipe.commands.maintain:select",
        "Make a new version of a data set with some of its crops; no tar is written.",
    ),
    "reshard": Command(
        "datapipe.commands.maintain:reshard",
        "Merge data sets, or cut one into other shards; no image is decoded. Goes on where a killed run stopped.",
    ),
    "remove": Command(
        "datapipe.commands.maintain:remove",
        "Take crops out of all versions of a data set and out of its stored bytes, for good.",
    ),
    "preview": Command(
        "datapipe.commands.inspect:preview",
        "Draw a contact sheet of crops and of the views that training will see of them.",
    ),
    "synth": Command(
        "datapipe.commands.ingest:synth",
        "Render pedestrians as a Market-1501-style folder, for demos and tests.",
    ),
}


def main(arguments: list[str]) -> int:
    """Dispatch to a command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return cli.dispatch(COMMANDS, arguments, prog="python -m datapipe")


def console() -> int:
    """The command line of this process; the exit code."""
    return cli.run(main)


if __name__ == "__main__":
    sys.exit(console())
