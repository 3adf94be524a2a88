"""Processes that Ray's own memory monitor ends: Ray raises no RayActorError for them."""

import os
import subprocess
import sys
import tempfile

from tests.support.golden import ROOT

SCRIPT = """
import sys
from types import SimpleNamespace
import ray
from cluster.train import rendezvous
from cluster.train.controller_callbacks import MUTE, RestartPolicy
from cluster.train.driver import Driver
from ray.exceptions import RayError

ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], log_to_driver=False,
         _system_config={"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 100})

@ray.remote(num_cpus=0)
class Worker:
    def execute(self, call):
        return call()

class Group:
    worker = Worker.remote()
    def __len__(self):
        return 1
    def execute_single_async(self, rank, call):
        return self.worker.execute.remote(call)

rendezvous._group[:] = [Group()]
policy = RestartPolicy("", SimpleNamespace(cluster=None))
while (dead := policy._dead()) in ({}, {0: MUTE}):  # alive, or slow to begin
    pass
print(dead)
driver = Driver.__new__(Driver)
driver._stop_sent = False
try:
    ray.get(Group.worker.execute.remote(int))
except RayError as error:
    driver._error = error
print(type(driver._error).__name__, driver._orphaned(SimpleNamespace(ending=None)))
driver.config = SimpleNamespace(out="run")
print(driver._lost(driver._error))
"""


def test_memory_monitor__kills_are_deaths_like_others() -> None:
    """A real Ray that finds any machine too full: who is killed is told apart, and a controller is replaced."""
    with tempfile.TemporaryDirectory(prefix="mem", ignore_cleanup_errors=True) as folder:
        done = subprocess.run([sys.executable, "-c", SCRIPT, folder], cwd=ROOT, capture_output=True, text=True,
                              timeout=300, check=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"})  # fmt: skip
    assert "{0: 'Ray killed it for want of memory'}" in done.stdout
    assert "OutOfMemoryError True" in done.stdout
    assert "low on memory" in done.stdout and "goes on" in done.stdout
