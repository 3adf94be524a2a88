"""The driver of a run under Ray Train: starts the workers, judges what ended them, and keeps the history."""

import json
import threading
import time
from typing import Any

import torch

from cluster.core.devices import DeviceChoice, decide, grows, hidden, offered
from cluster.train.group_size import GroupSize, of_cluster
from cluster.train.trainer_setup import make_trainer, worker_resources
from cluster.train.watch.hang_detection import Hung, accusation, end_process, hung, slow_start
from cluster.train.watch.hang_evidence import keep_evidence
from cluster.train.watch.restart_policy import END, HISTORY, Failure, Restarts
from cluster.train.watch.start_watch import Seen, StartWatch
from datapipe.core.errors import ClusterError, UserError
from datapipe.core.progress import counted
from datapipe.core.stop_signals import at_end
from training import checkpoint
from training.config.batch_split import most_useful
from training.config.continuation import ran_on
from training.config.run_config import RunConfig
from training.core.host import LocalHost
from training.core.run_folder import starting
from training.core.run_folder.lease import Lease
from training.core.run_folder.run_folder import RunFolder
from training.preflight.checks import refuse_unsuited

POLL_S = 0.3
LOOK_S = 5.0
"""Seconds between looks whether there is room for workers, and how far their processes are."""
SLOW_S = 30.0
"""Seconds without progress after which a start is said to be slow, and between lines about it."""
IDLE_S = 5.0
"""Seconds without workers after which a stop needs no save."""
FAREWELL_S = 10.0
"""For Ray Train to end by itself: a process that shuts Ray down under its thread may die of a segmentation fault."""


class Driver:
    """Starts the workers, passes on their lines and our stop word, ends those that hang, keeps the history."""

    def __init__(self, config: RunConfig, signals: LocalHost, scratch: str, lease: Lease, *, embedded: bool) -> None:
        from cluster.train.coordinator import start_coordinator
        from cluster.train.room import StartingProcesses

        self.config, self.signals, self.scratch, self.embedded = config, signals, scratch, embedded
        self.lease = lease
        self.folder = RunFolder(config.out, config.storage, lease)
        self.choice = self._choose()
        self.size = self._count()
        self._name, self._coordinator = start_coordinator(self._begin(), Restarts(config.cluster, config.out))
        self._trainer = self._make_trainer()
        self._error: BaseException | None = None
        self._leaving = threading.Event()
        self._stop_sent, self._printed_at = False, 0.0
        self._start, self._starting = StartWatch(config.cluster.start_timeout_s), StartingProcesses()
        self._looked_at = time.monotonic()
        self._grows: bool | None = None
        self._ended: set[int] = set()

    def _choose(self) -> DeviceChoice:
        """GPUs or CPUs, for as long as this command lasts. Raises ConfigError."""
        wanted, offer = self.config.engine.device, offered(embedded=self.embedded)
        choice = decide(wanted, offer, before=ran_on(self.folder))
        print(f"device: {choice.kind} ({choice.why})", flush=True)
        if unused := hidden(choice, wanted):
            print(unused, flush=True)
        refuse_unsuited(self.config, torch.device(choice.kind))
        return choice

    def _count(self) -> GroupSize:
        """How many workers, for as long as this command lasts. Raises ConfigError."""
        wanted = worker_resources(self.config, self.choice)
        size = of_cluster(self.config.cluster, wanted, useful=most_useful(self.config), embedded=self.embedded)
        print(f"workers: {size}", flush=True)
        return size

    def _make_trainer(self) -> Any:
        return make_trainer(self.config, self._name, self.scratch, self.choice, self.size, self.lease.ticket,
                            embedded=self.embedded)  # fmt: skip

    def train(self) -> bool:
        """True: complete; False: stopped, and resumable. Raises UserError."""
        ending = "failed"
        stopped = {"time": time.time(), "kind": END, "reason": "stopped"}
        try:
            with at_end(lambda: self._record(stopped)):
                complete = self._train()
            ending = "complete" if complete else "stopped"
        finally:
            if not self.lease.lost:
                self._record({"time": time.time(), "kind": END, "reason": ending})
        return complete

    def _train(self) -> bool:
        print("starts the workers", flush=True)
        starting.note(self.folder, "starts the workers")
        self._start_controller()
        try:
            return self._accompany()
        finally:
            self._leaving.set()
            self._fitting.join(FAREWELL_S)

    def _start_controller(self, delay_s: float = 0.0) -> None:
        """Off the main thread Ray Train leaves our signal handlers alone."""
        self._error = None
        self._fitting = threading.Thread(target=self._fit, args=(delay_s,), name="ray train", daemon=True)
        self._fitting.start()

    def _accompany(self) -> bool:
        """What `train` returns and raises, once it is clear."""
        import ray

        while True:
            if self.lease.lost:
                raise self.lease.lost
            alive = self._fitting.is_alive()
            try:
                notes = ray.get(self._coordinator.take.remote())
            except ray.exceptions.RayError as error:
                raise self._lost(error) from error
            self._pass_on(notes)
            if notes.failure is not None:
                raise notes.failure
            if not alive:
                if not self._orphaned(notes):
                    return self._ending(notes)
                self._replace_controller()
            if self._stop_sent and notes.waiting_s > IDLE_S:
                print("stopped while no workers were there; the last checkpoint stays", flush=True)
                return False
            self._guard(notes)
            time.sleep(POLL_S)

    def _fit(self, delay_s: float) -> None:
        if self._leaving.wait(delay_s):
            return
        try:
            self._trainer.fit()
        except BaseException as error:  # noqa: BLE001  (judged in the main thread)
            self._error = error

    def _orphaned(self, notes: Any) -> bool:
        """Has Ray Train's controller died, by Ray's memory monitor too, and is there work left?"""
        from ray.exceptions import OutOfMemoryError, RayActorError

        complete = notes.ending is not None and notes.ending[1]
        return isinstance(self._error, RayActorError | OutOfMemoryError) and not complete and not self._stop_sent

    def _replace_controller(self) -> None:
        """Have the workers of the dead one end, if Ray has not yet seen to it, and start another one with its own."""
        import ray

        from cluster.train.room import give_back

        give_back()
        ray.get(self._coordinator.abandon.remote())
        decision = ray.get(self._coordinator.follow.remote(Failure("controller", "Ray Train's controller died")))
        if decision.give_up is None:
            self._trainer = self._make_trainer()
            self._start_controller(decision.delay_s)

    def _begin(self) -> int:
        """The step of the newest checkpoint; a run that goes on has the new start in its history."""
        names = checkpoint.complete(self.folder.at("checkpoints"))
        saved = checkpoint.step_of(names[-1]) or 0 if names else 0
        if any(self.folder.names("metrics/")):
            self._record({"time": time.time(), "kind": "driver", "reason": "the command was run again",
                          "step": saved, "saved": saved})  # fmt: skip
        return saved

    def _pass_on(self, notes: Any) -> None:
        """Pass on what was noted: lines to the terminal, restarts to the history, the stop word to the workers."""
        self.signals.starting = not notes.stepping
        for line in notes.lines:
            self.signals.show_line(line)
        for restart in notes.restarts:
            self._record(restart)
            self._ended.clear()
            then = "giving up" if restart["gave_up"] else f"again in {restart['delay_s']:.0f} s" if restart[
                "delay_s"] else "again at once"  # fmt: skip
            print(f"workers ended after step {restart['step']:,} ({restart['kind']}): {restart['reason']}; {then} from "
                  f"step {restart['saved']:,}", flush=True)  # fmt: skip
            starting.note(self.folder, f"starts workers anew; the last ended: {restart['reason']}")
            if kept := keep_evidence(self.scratch, self.folder):
                print(f"stacks of all ranks and NCCL's report are kept: {', '.join(kept)}", flush=True)
        if notes.stop and self.signals.received is None:
            self.signals.notice(notes.stop)
        if self.signals.received is not None and not self._stop_sent:
            self._stop_sent = True
            self._coordinator.stop.remote()

    def _record(self, restart: dict[str, Any]) -> None:
        self.folder.append(HISTORY, json.dumps(restart))
        self.folder.flush()

    def _guard(self, notes: Any) -> None:
        """End workers that hang; say what is waited for, and not for ever."""
        machine = self.config.cluster
        hanging = hung(notes.pulses, start_s=machine.start_timeout_s, hang_s=machine.hang_timeout_s,
                     silence_s=machine.silence_timeout_s)  # fmt: skip
        to_end = [one for one in hanging if one.rank in notes.places and notes.places[one.rank].pid not in self._ended]
        if to_end:
            self._end(to_end, notes.places)
        if notes.waiting_s:
            self._watch_start(time.monotonic())
            return
        self._start.reset()
        line = slow_start(notes.pulses, notes.places, after_s=SLOW_S)
        if line and time.monotonic() - self._printed_at > SLOW_S:
            self._printed_at = time.monotonic()
            print(line, flush=True)
            starting.note(self.folder, line)

    def _watch_start(self, now: float) -> None:
        """Say what is waited for while no workers are up. Raises ClusterError where it is not worth waiting for."""
        if now - self._looked_at < LOOK_S:
            return
        from cluster.train.room import held_on

        self._looked_at = now
        held = held_on()
        seen = Seen(self._starting.look(held)) if held else Seen(None, self._shortage(), self._hopeless())
        verdict = self._start.judge(seen, now)
        if verdict.error:
            raise ClusterError(verdict.error, where=self.config.out, hint="mended, or with other machines, the same "
                               "command goes on with the run")  # fmt: skip
        if verdict.line:
            print(f"workers are not up yet: {verdict.line}", flush=True)
            starting.note(self.folder, verdict.line, waits=not held)

    def _hopeless(self) -> str:
        """Why there can never be room for a worker on machines like those of the cluster; empty: there can, or others
        may come."""
        import ray

        from cluster.train.room import lacks

        lack = lacks(ray.nodes(), worker_resources(self.config, self.choice))
        if lack and self._grows is None:
            self._grows = not self.embedded and grows()
        return "" if self._grows else lack

    def _end(self, hanging: list[Hung], places: dict[int, Any]) -> None:
        import ray

        failure = accusation(hanging, places)
        ray.get(self._coordinator.blame.remote(failure))
        pids = [places[one.rank].pid for one in hanging]
        listed = f"process {pids[0]}" if len(pids) == 1 else f"processes {', '.join(map(str, pids))}"
        print(f"hung: {failure.reason}; SIGKILL to {listed}", flush=True)
        for one in hanging:
            self._ended.add(places[one.rank].pid)
            end_process(places[one.rank].node, places[one.rank].pid)

    def _shortage(self) -> str:
        import ray

        has, wanted = ray.cluster_resources(), worker_resources(self.config, self.choice)
        each = ", ".join(f"{value:g} {name}" for name, value in wanted.items())
        present = ", ".join(f"{has.get(name, 0):g} {name}" for name in wanted)
        return (f"at least {self.size.least} of {each} each are needed; the cluster has {present} "
                f"on {counted(sum(node['Alive'] for node in ray.nodes()), 'machine')}")  # fmt: skip

    def _ending(self, notes: Any) -> bool:
        if notes.ending is not None and (notes.ending[1] or self._stop_sent):
            return bool(notes.ending[1])
        if self._stop_sent:
            return False  # told to stop between two groups of workers
        raise self._lost(self._error) from self._error

    def _lost(self, error: BaseException | None) -> UserError:
        lines = [line for line in str(error or "").splitlines() if line.strip()] or ["it did not say why"]
        low = next((line for line in lines if "low on memory" in line), "")
        hint = (
            "give Ray fewer workers a machine, or end what else takes its memory"
            if low
            else "--debug shows the whole trace"
        )
        return ClusterError(f"Ray Train ended by itself: {low or lines[-1]}", where=self.config.out,
                            hint=f"{hint}; started again, the run goes on")  # fmt: skip
