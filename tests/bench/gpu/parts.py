"""A step's parts on a GPU's own clock: events at their borders, and nothing in a step that waits.

    copy          views to the device, and their normalisation
    teacher       forward pass of its backbone
    student       forward pass of its backbone and decoders
    heads, loss   the rest of the forward pass
    backward      of all of it
    reduce        what ranks tell each other; not had here, as there is one
    after         norms, clipping, optimizer, centres, moving average
    idle          between them: the host decides, and gets the next batch

A GPU that waits for the host within a part does so in that part's time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch

from datapipe.stream.batch import Batch
from tests.bench.gpu.trial import Trial
from training.engine.stepper import Result
from training.methods.base import Views
from training.nn.mae_decoder import Decoder

PARTS = ("copy", "teacher", "student", "heads, loss", "backward", "reduce", "after", "idle")
ABSENT = {"reduce": "one process has no others to add up gradients with"}
"""Parts that a step on one GPU does not have, and why."""
OUTER, INNER = ("copy", "forward", "backward", "after"), ("teacher", "student")
"""Parts that follow each other in a step, and those within the forward pass."""


class Watcher(Protocol):
    """Is told where a part begins and ends, as the host comes to it."""

    def enter(self, part: str) -> None: ...

    def leave(self) -> None: ...


class Span(NamedTuple):
    """A part in one step: events on the GPU's clock."""

    step: int
    part: str
    begin: Any
    end: Any


class Timeline:
    """Times of parts, by events of `mark`."""

    def __init__(self, mark: Callable[[], Any]) -> None:
        """`mark`: records an event; from one to another are `one.elapsed_time(other)` milliseconds."""
        self._mark, self._open, self._starts = mark, list[tuple[str, Any]](), list[Any]()
        self._spans: list[Span] = []

    def enter(self, part: str) -> None:
        self._open.append((part, self._mark()))
        if part == "copy":
            self._starts.append(self._open[-1][1])

    def leave(self) -> None:
        part, begin = self._open.pop()
        self._spans.append(Span(len(self._starts), part, begin, self._mark()))

    def milliseconds(self) -> dict[str, float | None]:
        """Of every part, on average over all steps but the last, whose end is not known; they add up to a step. None
        for those in `ABSENT`. After a synchronisation."""
        steps = len(self._starts) - 1
        took = dict.fromkeys((*OUTER, *INNER), 0.0)
        for span in self._spans:
            if span.step <= steps:
                took[span.part] += span.begin.elapsed_time(span.end) / steps
        whole = self._starts[0].elapsed_time(self._starts[-1]) / steps
        took["heads, loss"] = took["forward"] - took["teacher"] - took["student"]
        took["idle"] = whole - sum(took[part] for part in OUTER)
        return {part: None if part in ABSENT else took[part] for part in PARTS}


@contextmanager
def watched(trial: Trial, by: Watcher) -> Iterator[None]:
    """The steps of `trial` meanwhile, `by` being told. One micro-batch a step, one rank."""
    run, stepper = trial.run, trial.run.stepper
    hooks = [hook for part, modules in _inner(trial).items() for module in modules for hook in (
        module.register_forward_pre_hook(lambda *_, part=part: by.enter(part)),
        module.register_forward_hook(lambda *_: by.leave()),
    )]  # fmt: skip
    place, step, ended, after = run.place, stepper.step, trial.each_step, [False]

    def leave_after() -> None:
        if after[0]:  # a batch that is done again, as gradients overflowed, has no end of its step
            after[0] = False
            by.leave()

    def placed(batch: Batch) -> Views:
        leave_after()
        by.enter("copy")
        views = place(batch)
        by.leave()
        return views

    def stepped() -> Result:
        by.enter("after")
        after[0] = True
        return step()

    def end() -> None:
        leave_after()
        ended()

    run.place, trial.each_step = placed, end
    stepper.forward = _within("forward", stepper.forward, by)  # type: ignore[method-assign]
    stepper.backward = _within("backward", stepper.backward, by)  # type: ignore[method-assign]
    stepper.step = stepped  # type: ignore[method-assign]
    try:
        yield
    finally:
        run.place, trial.each_step = place, ended
        for name in ("forward", "backward", "step"):
            delattr(stepper, name)  # the class's own are behind them
        for hook in hooks:
            hook.remove()


def _inner(trial: Trial) -> dict[str, Sequence[torch.nn.Module]]:
    """Networks whose calls are parts of the forward pass. Without a teacher there is none of it."""
    networks = trial.method.networks()
    decoders = [module for module in networks["student"].modules() if isinstance(module, Decoder)]
    teacher = [networks["teacher"].get_submodule("backbone")] if "teacher" in networks else []
    return {"teacher": teacher, "student": [networks["student"].get_submodule("backbone"), *decoders]}


def _within(part: str, real: Callable[..., Any], by: Watcher) -> Callable[..., Any]:
    def told(*words: Any, **named: Any) -> Any:
        by.enter(part)
        found = real(*words, **named)
        by.leave()
        return found

    return told
