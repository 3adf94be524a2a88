"""The faults: how each is inflicted, at which moment, and what shows that the run is over it."""

import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.chaos import poison
from tests.chaos.gate import MARKING, SAVING
from tests.chaos.scene import BUCKET, NO_FAULTS, Objects, Scene
from tests.cluster.local_nodes import PATIENCE_S
from tests.support.faulty_proxy import Faults

Moment = Literal["before the first save", "in a save", "before the marker", "between saves"]
HELD: dict[Moment, re.Pattern[str]] = {"in a save": SAVING, "before the marker": MARKING}
"""Moments at which a request is held until the blow has fallen, and which request."""

BATCH = 6
"""Of the tiny recipe."""
SERVER_DOWN_S = 20.0
SLOW_S = 1.0
ERRORS = ("500", "503", "reset", "lost")


@dataclass
class Event:
    """A fault that the run got over, as its own records tell."""

    kind: str
    moment: Moment
    at: float
    """Unix time of the blow."""
    restart: dict[str, Any] | None = None
    """The run's own record of why workers were started anew; None: they lived on."""
    attempt: list[dict[str, Any]] = field(default_factory=list)
    """Header and first steps of the attempt that followed."""
    back: float = 0.0
    """Unix time of the first step afterwards."""
    redone: int = 0
    note: str = ""

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage of the recovery. A machine may have had the process before the blow."""
        if not self.attempt or self.restart is None:
            return {}
        ends = {"detected": self.restart["time"], **self.attempt[0]["startup"], "first step": self.back}
        found, last = {}, self.at
        for stage, end in ends.items():
            found[stage], last = max(0.0, end - last), max(last, end)
        return found


@dataclass(frozen=True)
class Kind:
    """A fault."""

    strike: Callable[[Scene], str]
    """Inflicts it; returns what the table says of it."""
    fatal: bool = True
    """Do the workers end by it?"""
    moments: tuple[Moment, ...] = ("in a save", "before the marker", "between saves")
    said: tuple[str, ...] = ()
    """Kinds of restart that the run may call it."""


def inflict(scene: Scene, name: str, moment: Moment, load: str = "") -> Event:
    """Wait for the moment, strike, wait until the run is over it. `load`: how storage behaves while it recovers."""
    kind, objects = KINDS[name], _objects(scene)
    if kind.strike in (truncate, flip):
        scene.run.until(lambda: objects.gate.marked)  # a checkpoint that can be damaged
    reached = _await(scene, moment)
    known = len(scene.restarts())
    event = Event(name, moment, time.time())
    event.note = kind.strike(scene)
    if load:
        LOADS[load](scene)
    struck = time.time()
    objects.gate.open(drop=kind.fatal)
    if kind.fatal:
        _see_restart(scene, event, known, reached)
        assert event.restart is not None and event.restart["kind"] in kind.said, event.restart
    else:
        _see_save(scene, event, struck)
    objects.proxy.faults, objects.gate.slow_s = NO_FAULTS, 0.0
    return event


def arm_first_save(scene: Scene) -> None:
    """Before the run is started: nothing is saved until the blow "before the first save" has fallen."""
    _objects(scene).gate.arm(SAVING)


def _objects(scene: Scene) -> Objects:
    assert scene.objects is not None
    return scene.objects


def _await(scene: Scene, moment: Moment) -> int:
    """The step that the run has reached, at least, when the moment has come."""
    gate = _objects(scene).gate
    if moment in HELD:
        return gate.stop(HELD[moment], scene.running)
    if moment == "before the first save":
        gate.reached(scene.running)  # armed before the run was started
        return 0
    seen = len(gate.marked)
    scene.run.until(lambda: len(gate.marked) > seen)
    time.sleep(scene.random.uniform(0, 1))  # somewhere between two saves
    return gate.marked[-1][1]


def _see_restart(scene: Scene, event: Event, known: int, reached: int) -> None:
    """The record of the restart, and the first step after it."""
    event.restart = scene.run.until(lambda: scene.restarts()[known:])[0]
    event.attempt = scene.run.until(lambda: _attempt_after(scene, event.at))
    event.back = event.attempt[1]["time"]
    event.redone = max(reached, event.restart["step"]) - event.attempt[0]["step"]


def _attempt_after(scene: Scene, at: float) -> list[dict[str, Any]]:
    """Header and steps of the newest attempt, if it began after then and has made a step; else nothing."""
    names = scene.attempts()
    lines = scene.lines(names[-1]) if names else []
    return lines if len(lines) > 1 and lines[0]["startup"]["imported"] > at else []


def _see_save(scene: Scene, event: Event, struck: float) -> None:
    """The run got on: there is another checkpoint."""
    gate = _objects(scene).gate
    event.back = scene.run.until(lambda: [when for when, _ in gate.marked if when > struck])[0]


def storm(scene: Scene, count: int) -> None:
    """End so many groups in a row, as soon as the group is there: one by its controller's death, the others by a
    worker's, now on one machine, now on another, as a single bad one is found out sooner."""
    struck = None
    for turn in range(count):
        pids = scene.run.until(lambda: all(found := (scene.pid(0), scene.pid(1))) and found)
        pid = next((pid for pid in pids if scene.machine_of(pid) is not struck), pids[0])
        struck = scene.machine_of(pid)
        scene.kill(scene.run.until(scene.controller) if turn == 1 else pid)
        scene.run.until(lambda pids=pids: not scene.running() or not {scene.pid(0), scene.pid(1)} & {*pids})


# ---------------------------------------------------------------------------------------------------------- the blows


def _any_worker(scene: Scene) -> int:
    rank = scene.random.randrange(2)
    return scene.run.until(lambda: scene.pid(rank))


def kill_worker(scene: Scene) -> str:
    pid = _any_worker(scene)
    scene.kill(pid)
    return f"process {pid}"


def kill_machine(scene: Scene) -> str:
    """A machine with a worker, and all that runs on it. Another one takes its place."""
    node = scene.run.until(lambda: scene.machine_of(_any_worker(scene)))
    scene.kill_machine(node)
    scene.add_machine()
    return f"node {node.node_id[:8]}"


def kill_driver(scene: Scene) -> str:
    """The command itself; it is given again."""
    scene.run.process.kill()
    scene.run.end()
    scene.start()
    return "submitted again"


def kill_controller(scene: Scene) -> str:
    """Ray Train's controller: the command starts another one."""
    pid = scene.run.until(scene.controller)
    scene.kill(pid)
    return f"process {pid}"


def stop_worker(scene: Scene) -> str:
    pid = _any_worker(scene)
    scene.kill(pid, signal.SIGSTOP)
    return f"process {pid}"


def kill_server(scene: Scene) -> str:
    objects = _objects(scene)
    objects.kill()
    objects.gate.open(drop=True)
    time.sleep(SERVER_DOWN_S)  # that long it is away
    objects.start()
    return f"away for {SERVER_DOWN_S:.0f} s"


def storage_errors(scene: Scene) -> str:
    _misbehave(scene)
    return "half of all requests"


def slow_storage(scene: Scene) -> str:
    _objects(scene).gate.slow_s = SLOW_S
    return f"each request {SLOW_S:.0f} s"


def at_load(behave: Callable[[Scene], str]) -> Callable[[Scene], str]:
    """A worker is killed, and storage behaves like this while the run recovers."""

    def strike(scene: Scene) -> str:
        kill_worker(scene)
        return behave(scene)

    return strike


def _misbehave(scene: Scene) -> None:
    _objects(scene).proxy.faults = Faults(rate=0.5, kinds=ERRORS, seed=scene.random.randrange(1 << 30))


def truncate(scene: Scene) -> str:
    return _damage(scene, lambda content: content[: len(content) // 2])


def flip(scene: Scene) -> str:
    """In the numbers: what a part's head says to other programs is in the marker, too, and not read there."""
    bit = scene.random.randrange(1 << 16)

    def flipped(content: bytes) -> bytes:
        head = 8 + int.from_bytes(content[:8], "little")
        place = head + bit % (len(content) - head)
        return content[:place] + bytes([content[place] ^ 1 << bit % 8]) + content[place + 1 :]

    return _damage(scene, flipped)


def _damage(scene: Scene, change: Callable[[bytes], bytes]) -> str:
    """Change a file of the newest checkpoint, then kill all workers, so that none finishes the save that is under way:
    the run must go back to the one before."""
    client = _objects(scene).client
    entries = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{_prefix(scene)}/checkpoints/")["Contents"]
    newest = max(found[1] for entry in entries if (found := MARKING.search("/" + entry["Key"])))
    files = sorted(entry["Key"] for entry in entries if f"/step_{newest}/" in entry["Key"])
    key = scene.random.choice([file for file in files if SAVING.search("/" + file)])
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=key, Body=change(content))
    for pid in filter(None, [scene.pid(0), scene.pid(1)]):
        scene.kill(pid)
    return key.removeprefix(f"{_prefix(scene)}/checkpoints/")


def _prefix(scene: Scene) -> str:
    return scene.url.removeprefix(f"s3://{BUCKET}/")


def nan(scene: Scene) -> str:
    """In a step soon to come, on the one rank that has that place in the stream. Returns once it has been met."""
    gate = _objects(scene).gate
    step = gate.reached(scene.running) + AHEAD
    poison.write(scene.poison, BATCH * step + scene.random.randrange(BATCH), 1)
    known = len(scene.lines("faults/steps.jsonl"))
    gate.open(drop=False)
    (record,) = scene.run.until(lambda: scene.lines("faults/steps.jsonl")[known:])
    assert record["action"] == "rewound", record
    return f"step {record['step']} again"


def slow_worker(scene: Scene) -> str:
    """Let a worker run for a quarter of the time until the log names it."""
    pid = _any_worker(scene)
    rank = next(rank for rank in (0, 1) if scene.pid(rank) == pid)
    end = time.monotonic() + PATIENCE_S
    while not any(line.startswith(f"straggler: rank {rank} on") for line in scene.run.lines):
        assert time.monotonic() < end and scene.running(), "no straggler is named"
        scene.kill(pid, signal.SIGSTOP)
        time.sleep(0.03)
        scene.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    return f"rank {rank} named"


AHEAD = 30
"""Steps from a save to a NaN: more than to the next save, which waits for the one that is held, so that no rank comes
there before it is ordered."""
SAVES: tuple[Moment, ...] = ("in a save", "before the marker")
LOADS = {"storage errors in a load": storage_errors, "slow storage in a load": slow_storage}
KINDS = {
    "worker killed": Kind(kill_worker, said=("crash",)),
    "machine killed": Kind(kill_machine, said=("crash",)),
    "driver killed": Kind(kill_driver, said=("driver",)),
    "controller killed": Kind(kill_controller, said=("controller",)),
    "worker hangs": Kind(stop_worker, said=("hang",)),
    "S3 server killed": Kind(kill_server, fatal=False),
    "storage errors in a save": Kind(storage_errors, fatal=False, moments=("in a save",)),
    "slow storage in a save": Kind(slow_storage, fatal=False, moments=("in a save",)),
    **{name: Kind(at_load(behave), said=("crash",)) for name, behave in LOADS.items()},
    "checkpoint truncated": Kind(truncate, moments=SAVES, said=("crash",)),
    "checkpoint bit-flipped": Kind(flip, moments=SAVES, said=("crash",)),
    "NaN once": Kind(nan, fatal=False, moments=("in a save",)),
    "straggler": Kind(slow_worker, fatal=False, moments=("between saves",)),
}
