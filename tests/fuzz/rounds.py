"""Carries out rounds: sound inputs, hostile ones, and changed ones without end; what each reader made of them."""

import json
import os
import re
import select
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutate import mutated, mutated_json
from tests.fuzz.reader import Reader
from tests.fuzz.readers import reader as named
from tests.support.golden import ROOT
from tests.support.warm_python import Process, python

MOST_GROWTH_MB = 1_000
"""Of the peak over what the process has when it is idle, for any input."""
PATIENCE_S = 60
"""After which an input counts as one without an end."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
CLEAR = (0, 1)
"""Exit codes of a reader that knew what it did: read, or refused with one error."""


@dataclass
class Tally:
    """What became of the inputs of a reader."""

    inputs: int = 0
    good: int = 0
    refused: int = 0
    peak_mb: int = 0
    faults: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


class Child:
    """The process that reads (`child.py`); it is started anew when an input has ended it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, reader: str, folder: Path, out: Path) -> dict[str, Any]:
        """What came of the input. A process that ended or stands still is a fault of its own."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"reader": reader, "in": str(folder), "out": str(out)}) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        line = process.stdout.readline() if ready else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._end()
        why = "it has no end" if not ready else f"the process ended ({process.returncode})"
        return {"code": -1, "said": "", "trace": why, "growth": 0, "outside": []}

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = Process([python(), "-m", "tests.fuzz.child"], cwd=ROOT, env=environment, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1)  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(list(self.names)) + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError(f"a sound input of {', '.join(self.names)} ends the process")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def faults(answer: dict[str, Any], *, may_pass: bool = True) -> Iterator[str]:
    """What is wrong with what came of an input; nothing where it was read, or refused by one clear error."""
    if answer["trace"]:
        yield "trace: " + answer["trace"].strip().splitlines()[-1][:200]
    elif "Traceback (most recent call last)" in answer["said"]:
        yield "a trace was printed"
    elif answer["code"] not in CLEAR:
        yield f"exit code {answer['code']}"
    elif answer["code"] == 1 and not answer["said"].strip():
        yield "exit code 1 without a word"
    elif answer["code"] == 0 and not may_pass:
        yield "exit code 0 for what must be refused"
    if answer["growth"] > MOST_GROWTH_MB:
        yield f"{answer['growth']:,} MB more memory"
    if answer["outside"]:
        yield f"outside: {answer['outside'][0]}"
    if control := set(CONTROL.findall(answer["said"])):
        yield f"control characters on the terminal: {sorted(map(ascii, control))}"


class Rounds:
    """Inputs for some readers, in a folder of their own; faulty inputs are kept below `kept`."""

    def __init__(
        self,
        names: Sequence[str],
        seed: int,
        kept: Path | None = None,
        leave_out: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """`leave_out`: reader -> names of hostile inputs that are not tried."""
        self.readers = [named(name) for name in names]
        self.seed, self.kept, self.leave_out = seed, kept, leave_out or {}
        self.tallies = {name: Tally() for name in names}
        self._place = tempfile.TemporaryDirectory(prefix="fuzz-")
        self._child = Child(names)

    def __enter__(self) -> "Rounds":
        for reader in self.readers:
            sound = self._folder("sound", reader.name)
            reader.make(sound)
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()
        self._place.cleanup()

    def sound(self) -> None:
        """Every sound input is read; else nothing that follows means a thing."""
        for reader in self.readers:
            answer = self.judge(reader.name, "sound", partial(self.copy, reader.name))
            if answer["code"] != 0:
                self.tallies[reader.name].faults.append(f"the sound input is not read: {answer['said'][:500]}")

    def hostile(self, most: int | None = None) -> None:
        """What was made to hurt; the first `most` of each reader."""
        for reader in self.readers:
            tried = [one for one in reader.hostile.items() if one[0] not in self.leave_out.get(reader.name, ())]
            for name, make in tried[:most]:
                self.judge(reader.name, name, make, may_pass=name not in reader.refused)

    def changed(self, count: int) -> None:
        """So many changed inputs of each reader."""
        for reader in self.readers:
            for number in range(count):
                random = Random(f"{self.seed} {reader.name} {number}")
                self.judge(reader.name, f"changed-{self.seed}-{number}", partial(self._change, reader, random))

    def judge(
        self, reader_name: str, name: str, make: Callable[[Path], object], *, may_pass: bool = True
    ) -> dict[str, Any]:
        """Try an input that `make` writes, and count what came of it. `may_pass`: it may be read without an error."""
        reader = named(reader_name)
        folder, out = self._folder("in"), self._folder("out")
        make(folder)
        before = _listed(folder)
        answer = self._child.ask(reader.name, folder, out)
        tally = self.tallies[reader.name]
        tally.inputs += 1
        tally.good += answer["code"] == 0
        tally.refused += answer["code"] == 1
        tally.peak_mb = max(tally.peak_mb, answer["growth"])
        found = list(faults(answer, may_pass=may_pass))
        if not reader.writes and _listed(folder) != before:
            found.append("the input was changed")
        for fault in found:
            tally.faults.append(f"{name}: {fault}")
            tally.kinds[fault.partition(":")[0]] += 1
        if found and self.kept is not None:
            place = self.kept / reader.name / name.replace("/", "_")
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder, place / "in", symlinks=True, ignore=_special)
            (place / "answer.txt").write_text(
                "\n".join([*found, "", answer["said"][-4_000:], answer["trace"]]), errors="backslashreplace"
            )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        return answer

    def _change(self, reader: Reader, random: Random, folder: Path) -> None:
        self.copy(reader.name, folder)
        paths = sorted({path for pattern in reader.changed for path in folder.glob(pattern) if path.is_file()})
        path = random.choice(paths)
        data = path.read_bytes()
        text = path.suffix in (".json", ".jsonl") and random.random() < 0.7
        if text and path.suffix == ".jsonl":
            lines = data.splitlines()
            place = random.randrange(len(lines))
            lines[place] = mutated_json(lines[place], random)
            path.write_bytes(b"\n".join(lines) + b"\n")
        else:
            others = [other.read_bytes() for other in paths[:8]]
            path.write_bytes(mutated_json(data, random) if text else mutated(data, others, random))
        reader.reseal(folder)

    def copy(self, name: str, folder: Path) -> None:
        """The sound input of a reader."""
        shutil.copytree(Path(self._place.name, "sound", name), folder, dirs_exist_ok=True)

    def _folder(self, *parts: str) -> Path:
        folder = Path(self._place.name, *parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _listed(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _special(folder: str, names: list[str]) -> list[str]:
    """What is no file, or a huge one."""
    paths = {name: Path(folder, name) for name in names}
    return [
        name
        for name, path in paths.items()
        if not path.is_dir() and (not path.is_file() or path.stat().st_size > 10**8)
    ]
