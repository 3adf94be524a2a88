"""All that we use of Ray beside its public interface, each with the reason: no other file imports private parts of it.

What is public and serves is used in its place: `ray.train.get_preemption_info` tells of drained machines, the hooks of
`ray.train.backend.Backend` see workers come and go, and `ray.train.FailureConfig` gives survivors time to save.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

MONITORS = ("autoscaler/_private/monitor.py", "autoscaler/v2/monitor.py")
"""Ray's autoscaler is one of these processes beside the head. Nothing public says whether there is one."""
HEAD = "node:__internal_head__"
"""A resource that only the head has. `ray.nodes()` marks the head in no other way."""
PREEMPTION = 2
"""Ray's number for "this machine will be taken away" as the reason of a drain."""
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""The variable in which Ray hands `worker_process_setup_hook` to processes ("package.module.function"): in the
environment of some actors it is theirs alone, while `ray.init` takes one for all processes of a job."""
ANSWER_S = 5.0
"""Seconds for the raylet of the own machine to answer."""


class TrainInternals(NamedTuple):
    """Classes of Ray Train's controller."""

    controller_callback: Any
    """Base class of callbacks that hear of the controller's states. The public one, `ray.train.UserCallback`, hears of
    exceptions in a running group alone: neither of a group that did not come up nor of a new size before it is made,
    and it cannot end the run."""
    resizing: Any
    """State: workers are about to be ended for another size."""
    restarting: Any
    """State: workers ended, and are to be started anew."""
    rescheduling: Any
    """State: workers did not come up, and are to be started anew."""
    no_room: type[Exception]
    """Raised where workers found no room in time; no public exception tells it from a failure."""


def train_internals() -> TrainInternals:
    """The parts of Ray Train's controller that a run's restart policy needs. Imports Ray Train."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller import state

    return TrainInternals(
        ControllerCallback, state.ResizingState, state.RestartingState, state.ReschedulingState,
        WorkerGroupStartupTimeoutError,
    )  # fmt: skip


def lean_trainer() -> Any:
    """Ray Train's `TorchTrainer` without two actors that no setting leaves out.

    The detached one that gives back the room of a controller which died asks Ray's dashboard, and where there is none
    it does nothing for ever, whatever becomes of driver and cluster. The driver gives the room back itself; when it
    dies, Ray gives back all that its job holds. The other hands out data sets of Ray's: there are none, and each start
    would import Ray's data library for it, beside the workers.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # it sees the first version
            return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback | DatasetsCallback)]

    return Trainer


def drain(address: str, node: str, reason: str, deadline_ms: int) -> None:
    """Have Ray start nothing more on a machine that will be taken away.

    `address`: of the head; `node`: Ray's id of the machine; `deadline_ms`: Unix time. The command `ray drain-node`,
    which does the same, is hidden and said not to be public either.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    GcsClient(address=address).drain_node(node, PREEMPTION, reason, deadline_ms)


def refuses_token(address: str) -> bool:
    """Whether the head at `address` answers at once that the token is missing or wrong; `ray.init` tries that for
    20 s."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        return True
    except (OSError, ValueError, RuntimeError, RayError):
        return False  # for `ray.init` to say
    return False


def has_token() -> bool:
    """Whether there is a token where Ray looks for it. Ray's own look ends the process where there is none."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except (AuthenticationError, RuntimeError, OSError):  # RAY_AUTH_TOKEN_PATH names no file
        return False


def read_token_again() -> None:
    """Have Ray read the variables about its token again. It reads them once, when it is imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def cluster_of_this_machine() -> str:
    """The address (host:port) of the cluster that was started on this machine last, as far as the machine remembers,
    else of one that runs here. Raises ConnectionError or ValueError where there is none. `ray.init(address="auto")`
    finds it too, but joins at once, and tries a head that does not answer for minutes."""
    from ray._private import services

    getattr(services.find_gcs_addresses, "cache_clear", int)()  # of an earlier look
    return str(services.canonicalize_bootstrap_address_or_die("auto"))


def dashboard_of_head(head: str) -> str:
    """The URL of the dashboard that the head at host:port tells of. `JobSubmissionClient` asks the same, without a
    limit of time."""
    from ray.dashboard.utils import ray_address_to_api_server_url

    return str(ray_address_to_api_server_url(head))


def most_of_autoscaler() -> Mapping[str, float] | None:
    """Resources of the cluster at its largest, as its autoscaler has told; None where none has. Nothing public says
    what a cluster could grow to."""
    from ray._private.state import state

    known: Mapping[str, float] | None = state.get_max_resources_from_cluster_config()
    return known


def embedded_options(scratch: str, host: str) -> dict[str, Any]:
    """Arguments of `ray.init` for a Ray inside this process: its folder and its address. Public are only the command's
    (`ray start --temp-dir --node-ip-address`)."""
    return {"_temp_dir": scratch, "_node_ip_address": host}


@contextlib.contextmanager
def keeping_address() -> Iterator[None]:
    """Ray puts the machine's own address in the place of 127.0.0.1, but on desktop systems: told so, all of its ports
    and those of its workers are on loopback. No setting says it."""
    import ray._private.ray_constants as constants

    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def leaving_sigterm() -> Iterator[None]:
    """`ray.init` does not take SIGTERM, in Python or in C++ (where a handler of its own prints a trace). No setting
    prevents it."""
    import ray._private.utils as utils

    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def watch_nccl(confirm_s: float) -> None:
    """Where the users of this process have not said otherwise: Ray Train's controller asks NCCL's own watch (RAS) how
    far the ranks are, and keeps stacks of all ranks once they stand still for `confirm_s` seconds. For GPUs, before the
    trainer is made; Ray 2.59 knows nothing of it, and it switches itself off where NCCL's client `ncclras` is absent.

    These are variables of the environment, marked as experimental. It only observes ("fail" would end a run whose
    leading rank works alone for long, as in scoring): who hangs is decided from what ranks tell (`hang_detection`).
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
    os.environ.setdefault("RAY_TRAIN_NCCL_RAS_ACTION", "observe")
    os.environ.setdefault("RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S", f"{confirm_s:g}")
    os.environ.setdefault("RAY_TRAIN_NCCL_RAS_MIN_POLL_INTERVAL_S", f"{min(15.0, confirm_s / 4):g}")


NCCL_EVIDENCE = "hang_detector"
"""Folder below that of a Ray Train run in which the watch above leaves what it found."""


def entitle(title: str) -> None:
    """Set this process's name, as `ps` shows it. Ray sets another one when work comes."""
    from ray._raylet import setproctitle  # type: ignore[attr-defined]

    setproctitle(title)


def import_worker() -> None:
    """Import what the program of Ray's workers does, and Ray Train. No public module is that program."""
    import ray._private.workers.default_worker
    import ray.train
    import ray.train.v2.api.data_parallel_trainer  # noqa: F401


@contextlib.contextmanager
def random_ids_for_forks() -> Iterator[None]:
    """Around imports in a process that will fork: Ray's generator of random ids stays without a seed, so that each
    forked process draws its own. Once it has one, all of them draw the same ids, which then name tasks of different
    workers and machines of different clusters. It gets one where an actor's class is made, as modules do; here such ids
    come from the kernel."""
    import ray.actor

    module: Any = ray.actor
    usual = module.ActorClassID

    class FromKernel:
        @staticmethod
        def from_random() -> Any:
            return usual(os.urandom(usual.size()))

    module.ActorClassID = FromKernel
    try:
        yield
    finally:
        module.ActorClassID = usual


def start_ahead(count: int, *, keep_s: int) -> None:
    """In a worker: have this machine's raylet start `count` processes for the worker's own job and runtime environment;
    returns at once. The next actors there are given one each; what nobody wants ends after `keep_s` seconds, or with
    the job. Raises grpc.RpcError where no raylet answers, ImportError, AttributeError or ValueError where Ray has
    changed."""
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import get_runtime_env_info
    from ray.core.generated.common_pb2 import PYTHON  # type: ignore[attr-defined]  # made when it is imported
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # type: ignore[attr-defined]
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
    from ray.runtime_env import RuntimeEnv

    context = ray.get_runtime_context()
    own = context.get_runtime_env_string()
    request = PrestartWorkersRequest(language=PYTHON, job_id=bytes.fromhex(context.get_job_id()), num_workers=count,
                                     keep_alive_duration_secs=keep_s)  # fmt: skip
    request.runtime_env_info.CopyFrom(get_runtime_env_info(RuntimeEnv.deserialize(own)))
    request.runtime_env_info.serialized_runtime_env = own  # to the letter: environments are compared as text
    with init_grpc_channel(_raylet(context.get_node_id())) as channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_S)


def _raylet(node: str) -> str:
    """host:port of a machine's raylet. Raises ValueError where the machine is not known."""
    import ray

    for one in ray.nodes():
        if one["NodeID"] == node:
            return f"{one['NodeManagerAddress']}:{one['NodeManagerPort']}"
    raise ValueError(f"no such machine: {node}")


def run_hook(name: str) -> Any:
    """Call a set-up hook as Ray would. Ours takes the place of the run's own, which nothing public calls after it."""
    from ray._common.utils import load_class

    return load_class(name)()
