"""What Ray lets a process do before its work comes, by interfaces that it keeps to itself: start ahead of need, with a
function of ours that runs first."""

from typing import Any

SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""The variable in which Ray hands `worker_process_setup_hook` to processes ("package.module.function"): in the
environment of some actors it is theirs alone, while `ray.init` takes one for all processes of a job."""
ANSWER_S = 5.0
"""Seconds for the raylet of the own machine to answer."""


def entitle(title: str) -> None:
    """Set this process's name, as `ps` shows it. Ray sets another one when work comes."""
    from ray._raylet import setproctitle  # type: ignore[attr-defined]

    setproctitle(title)


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
    """Call a set-up hook as Ray would."""
    from ray._common.utils import load_class

    return load_class(name)()
