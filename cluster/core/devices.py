"""GPUs or CPUs: decided once, by the driver, from what Ray offers and what its autoscaler could bring."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import psutil
import torch
import yaml

from cluster.core.ray_internals import HEAD, MONITORS, most_of_autoscaler
from datapipe.core.errors import ConfigError
from training.core.devices import Device, choose_device

Kind = Literal["cpu", "cuda"]
BOTH = "--engine.device cuda to wait for GPUs, --engine.device cpu to train without"


class Offer(NamedTuple):
    """What a cluster has of GPUs."""

    now: float
    later: float | None
    """That its autoscaler could start, all in all. None: something scales it that does not say what it has."""
    embedded: bool
    """Ray lives in this process: no machine will join."""


class DeviceChoice(NamedTuple):
    """What workers compute on, and why, for a person."""

    kind: Kind
    why: str


def decide(wanted: Device, offer: Offer, *, before: str = "") -> DeviceChoice:
    """`before`: "cuda" or "cpu", what a run that goes on was on so far; empty: it begins, or nobody knows.

    Raises ConfigError where GPUs are asked for, or were used so far, and none can come; and where nobody can tell.
    """
    if wanted == "cpu":
        return DeviceChoice("cpu", "as engine.device says")
    if offer.now > 0:
        changed = "; the run was on CPUs so far" if before == "cpu" else ""
        return DeviceChoice("cuda", f"Ray offers {offer.now:g} GPUs{changed}")
    if offer.later:
        return DeviceChoice(
            "cuda", f"there is no GPU yet; the autoscaler may start up to {offer.later:g}, and is waited for"
        )
    where = "this machine offers Ray no GPU" if offer.embedded else "no machine of the cluster offers a GPU"
    if offer.later is None and wanted == "auto" and before != "cuda":
        raise ConfigError(f"{where} yet, and what scales it does not say whether it can start one",
                          where="engine.device = auto", hint=BOTH)  # fmt: skip
    if wanted == "cuda" and offer.later is not None:
        also = "" if offer.embedded else ", and there is no autoscaler that could start one"
        raise ConfigError(f"a GPU is asked for, and {where}{also}", where="engine.device = cuda",
                          hint="--engine.device cpu or auto; `ray status` lists the GPUs that Ray offers")  # fmt: skip
    if before == "cuda" and offer.embedded:
        raise ConfigError(f"this run was trained on GPUs so far, and {where}", where="engine.device = auto",
                          hint="--engine.device cpu goes on with it on CPUs")  # fmt: skip
    if wanted == "cuda" or before == "cuda":
        reason = "as engine.device says" if wanted == "cuda" else "the run was on GPUs so far"
        return DeviceChoice("cuda", f"{reason}; there is none yet, and it is waited for ({BOTH})")
    return DeviceChoice("cpu", where if offer.embedded else f"{where}, and no autoscaler could start one")


def offered(*, embedded: bool) -> Offer:
    """What the cluster that this process has joined offers."""
    import ray

    now = float(ray.cluster_resources().get("GPU", 0))
    return Offer(now, 0.0 if now or embedded else autoscaled("GPU"), embedded)


def hidden(choice: DeviceChoice, wanted: Device) -> str:
    """A line where this machine has GPUs that the run leaves alone though nobody told it to; empty otherwise."""
    if choice.kind == "cuda" or wanted != "auto" or not torch.cuda.is_available():
        return ""
    return (f"torch sees {torch.cuda.device_count()} GPUs on this machine that Ray does not offer: the run is on CPUs "
            "(`ray start --num-gpus N` offers them)")  # fmt: skip


def own_device(kind: Kind) -> torch.device:
    """In a worker: the GPU that Ray has given it, or the CPU. Raises ConfigError where torch cannot use that GPU."""
    if kind == "cpu":
        return torch.device("cpu")
    import ray

    given = [str(one) for one in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]
    return choose_device("cuda", index_of(given, os.environ.get("CUDA_VISIBLE_DEVICES")))


def index_of(given: Sequence[str], visible: str | None) -> int:
    """torch's number of a worker's GPU. `given`: Ray's ids of its GPUs, e.g. ["3"] or ["GPU-8f2c..."]; `visible`:
    CUDA_VISIBLE_DEVICES, which Ray Train sets to all GPUs of the group's workers on that machine; None: not set.

    Never from ranks: machines may have unequal numbers of workers, and a worker's GPU may have any number.
    Raises ConfigError where the GPU is not among the visible ones.
    """
    if not given:
        raise ConfigError("Ray has given this worker no GPU", where="engine.device", hint="--engine.device cpu")
    if visible is None:
        return int(given[0]) if given[0].isdecimal() else 0
    listed = [one.strip() for one in visible.split(",")]
    if given[0] not in listed:
        raise ConfigError(f"Ray has given this worker GPU {given[0]}, and it sees only {visible!r}",
                          where="CUDA_VISIBLE_DEVICES", hint="set it before `ray start`, not for workers")  # fmt: skip
    return listed.index(given[0])


def autoscaled(resource: str) -> float | None:
    """GPUs (or CPUs) on the machines that the cluster's autoscaler may start, all in all; see `Offer.later`."""
    known = most_of_autoscaler()
    if known is not None:
        return float(known.get(resource, 0))
    most: float | None = _on_head(_of_autoscaler, resource)
    return most


def grows() -> bool:
    """Whether something may bring machines to the cluster that this process has joined: an autoscaler, or something
    that does not say what it is."""
    return most_of_autoscaler() is not None or bool(_on_head(_is_autoscaled))


def _on_head(look: Callable[..., Any], *arguments: Any) -> Any:
    """What `look(address of the head, *arguments)` returns on the cluster's head; here, where there is no other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context()
    head = next((node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)
    if head is None or head == context.get_node_id():
        return look(context.gcs_address, *arguments)
    remote = ray.remote(num_cpus=0)(look).options(scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False))
    return ray.get(remote.remote(context.gcs_address, *arguments))


def _of_autoscaler(address: str, resource: str) -> float | None:
    """On the head: what is in the file that the autoscaler of the cluster at `address` goes by."""
    for path in _files_of_autoscalers(address):
        with contextlib.suppress(OSError, yaml.YAMLError):
            return most_of(_read(path), resource) if path else 0.0
    return None  # started without: KubeRay's autoscaler, for one, is in a container of its own


def _is_autoscaled(address: str) -> bool:
    """On the head: whether Ray's process beside it goes by a file of machines, or there is none that could say."""
    return bool(next(_files_of_autoscalers(address), "unknown"))


def _files_of_autoscalers(address: str) -> Iterator[str]:
    """On the head: the file of machines of each process beside it that could be the cluster's autoscaler; empty for one
    without a file, which starts no machine."""
    port = address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.endswith(MONITORS) for word in words) and _value(words, "--gcs-address").endswith(f":{port}"):
            yield _value(words, "--autoscaling-config")


def most_of(settings: Mapping[str, Any], resource: str = "GPU") -> float:
    """GPUs (or CPUs) of all machines that an autoscaler's settings (`ray up`'s cluster YAML) allow at once, its head
    aside."""
    total = 0.0
    for name, kind in (settings.get("available_node_types") or {}).items():
        most = 0 if name == settings.get("head_node_type") else kind.get("max_workers", settings.get("max_workers", 0))
        total += float((kind.get("resources") or {}).get(resource, 0)) * most
    return total


def _read(path: str) -> Mapping[str, Any]:
    with open(os.path.expanduser(path), encoding="utf-8") as file:
        return yaml.safe_load(file) or {}


def _value(words: Sequence[str], name: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")
