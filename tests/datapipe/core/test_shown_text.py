"""Control characters in names reach neither the terminal nor a log, whoever prints them."""

import logging
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.process_setup import shown
from tests.support.golden import ROOT
from training.core.run_folder.run_folder import RunFolder

EVIL = "\x1b[2J\x07\x9b31m\rx\u202egpj.\u2028"
HARMLESS = "\\x1b[2J\\x07\\x9b31m\\x0dx\\u202egpj.\\u2028"


def test_shown__leaves_text_as_it_is() -> None:
    for text in ("plain", "two\nlines\tand tabs", "äöü 日本 ‑ é", ""):
        assert shown(text) == text
    assert shown(EVIL) == HARMLESS


def test_command__prints_logs_and_fails_in_shown_text(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr

    def main(_: list[str]) -> int:
        print(EVIL)
        sys.stderr.write(EVIL + "\n")
        logging.getLogger("x").warning("%s", EVIL)
        raise DataError(f"what {EVIL}", where=f"{EVIL}\nerror: forged", hint=EVIL)

    assert cli.run(main, []) == cli.FAILED
    out, err = capsys.readouterr()
    assert out == HARMLESS + "\n" and err.count(HARMLESS) >= 4
    assert "\nerror: forged" not in err and not any(letter in out + err for letter in "\x1b\x07\x9b\r\u202e")
    assert (sys.stdout, sys.stderr) == before


PROGRAM = """
import sys, time
from datapipe.core import cli
from datapipe.core.progress import Progress
def main(_):
    with Progress("scan", 3) as progress:
        for _ in range(3):
            progress.advance(1, "evil \\x1b]0;x\\x07 [red]name[/red]")
            print("evil \\x1b[2J")
    return 0
sys.exit(cli.run(main))
"""


def test_bar__on_a_terminal_is_drawn_and_notes_are_shown() -> None:
    """rich puts streams of its own in place of standard output while a bar is drawn."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
                               env={**os.environ, "TERM": "xterm", "COLUMNS": "200"})  # fmt: skip
    os.close(theirs)
    said, ended = b"", False
    while not ended:
        ended = process.poll() is not None  # what it wrote before is there to be read
        while select.select([ours], [], [], 0.05)[0]:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                part = b""
            said += part
            if not part:
                break
    os.close(ours)
    assert process.returncode == 0
    assert b"scan" in said and b"\\x1b[2J" in said and b"\x1b[2J" not in said and b"\x1b]0;" not in said
    assert b"[red]name[/red]" in said and b"\x1b[2K" in said and b"\\x1b[2K" not in said  # the bar is drawn anew


def test_log__of_a_run_is_shown_text(tmp_path: Path) -> None:
    RunFolder(str(tmp_path), StorageConfig()).append("log.txt", EVIL)
    assert (tmp_path / "log.txt").read_text() == HARMLESS + "\n"
