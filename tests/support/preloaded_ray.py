"""What the tests' interpreter imports for processes of Ray, beside `preloaded`."""

import gc
from importlib import import_module

MODULES = (
    "ray", "ray._private.workers.default_worker", "ray.train", "ray.train.v2.api.data_parallel_trainer",
    "cluster.demo", "cluster.jobs.embed", "cluster.jobs.evaluate", "cluster.jobs.pretrain", "cluster.jobs.score_cfs",
    "cluster.jobs.shard",
    "cluster.train.worker", "cluster.train.controller_callbacks", "cluster.train.room",
)  # fmt: skip

for _name in MODULES:
    import_module(_name)
gc.freeze()
