"""On the path of every process of a Ray cluster on the null GPU: workers compute what kernels would, and Ray, which
counts GPUs by a library of the driver's, has as many as CUDA."""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _computed_workers(module: Any) -> None:
    """`training.trainer.pretrain`: the function that every rank calls."""
    from tests.null_gpu.computed import computed

    module.pretrain = computed()(module.pretrain)


def _computed_scores(module: Any) -> None:
    """`training.evaluation.evaluation`: the function that every task of an evaluation calls."""
    from tests.null_gpu.computed import computed

    module.score = computed()(module.score)


def _counted_gpus(module: Any) -> None:
    """`ray`: a cluster that is started here has all GPUs of the machine."""
    start = module.init

    def init(*words: Any, **settings: Any) -> Any:
        if settings.get("address") == "local":
            settings["num_gpus"] = int(os.environ.get("NULLCUDA_DEVICES", "1"))
        return start(*words, **settings)

    module.init = init


AFTER: dict[str, Callable[[Any], None]] = {
    "training.trainer.pretrain": _computed_workers, "training.evaluation.evaluation": _computed_scores,
    "ray": _counted_gpus,
}  # fmt: skip
"""Module -> what is done with it once it is imported."""


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in AFTER else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            AFTER[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("NULL_GPU"):
    sys.meta_path.insert(0, _Finder())
