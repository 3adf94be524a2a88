"""Handing in our commands as Ray jobs, each with room of its own, and again where their machine was lost."""

import importlib.util
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cluster.core.addresses import ANSWER_S, RAY_API_SERVER_ADDRESS, SUBMIT, dashboard_of, within
from cluster.core.arguments import EmbedJob, EvaluateJob, ScoreCfsJob, ShardJob, SubmitCommand
from cluster.core.job_paths import paths_of, refuse_relative
from cluster.core.ray_token import MODE, WITH_TOKEN, refuse_mode_without_token, refused, show_token
from cluster.keep_alive import LASTED_S
from datapipe.core import cli
from datapipe.core.errors import ClusterError
from training.commands.arguments import RecipeCommand
from training.commands.entry_points import read_evaluate

PACKAGES = ("cluster", "datapipe", "training")
MOST_MB = 20.0
"""Megabytes (10^6 bytes) that a job may upload. Our code is one."""
RECIPE = "recipe.toml"
POLL_S = 3.0
"""Seconds between looks at a job."""
HEAD_S = 900.0
"""Seconds that a head which does not answer is waited for."""
ENDED = "JOB_ENTRYPOINT_COMMAND_ERROR"
"""Ray's word for a job whose command ended by itself, with an exit code other than 0."""
NEVER_RAN = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
             "JOB_ENTRYPOINT_COMMAND_START_ERROR")  # fmt: skip
"""Ray's words for jobs that would not run the next time either."""


def submit(chosen: SubmitCommand, rest: Sequence[str]) -> int:
    """Hand in a command with the rest of its line as a Ray job; the exit code, the job's own where it is waited for.
    Raises UserError for what could not run there."""
    with tempfile.TemporaryDirectory(prefix="reid_job_") as folder:
        words = _PREPARE[chosen.command](list(rest), Path(folder))
        _stage(Path(folder))
        line = shlex.join(["python", "-m", "cluster.keep_alive", str(chosen.retries), chosen.command, *words])
        client, with_token = _client(chosen.address)
        room = _room(client.get_address(), chosen)
        job = _hand_in(client, chosen, line, folder, room)
        own = [] if chosen.address is None else ["--address", chosen.address]
        print(_in_words(job, client.get_address(), [*own, chosen.command, *rest], with_token=with_token), flush=True)
        if room.lack:
            print(room.lack, flush=True)
        again = partial(_hand_in, client, chosen, line, folder, room)
        return _until_over(client, job, chosen.retries, again) if chosen.wait else cli.COMPLETE


class Room(NamedTuple):
    """What is set aside for a command itself, as the job's entrypoint."""

    cpus: float
    memory: int
    """Bytes."""
    lack: str
    """A line where no machine of the cluster has as much; empty: one has, or nobody says."""


def _room(address: str, chosen: SubmitCommand) -> Room:
    """What the command asks for, seen beside what the machines of the cluster have."""
    from ray.util.state import list_nodes

    memory = round(1e9 * chosen.driver_memory_gb)
    try:
        nodes = [node.resources_total for node in list_nodes(address, filters=[("state", "=", "ALIVE")])]
    except Exception:  # of many kinds: what the cluster cannot say is no reason to hand nothing in
        nodes = []
    gpus = any(node.get("GPU", 0) for node in nodes)
    cpus = (1.0 if gpus else 0.0) if chosen.driver_cpus is None else chosen.driver_cpus
    if not nodes or any(node.get("CPU", 0) >= cpus and node.get("memory", 0) >= memory for node in nodes):
        return Room(cpus, memory, "")
    return Room(cpus, memory, f"no machine of the cluster has {cpus:g} CPU and {memory / 1e9:g} GB of memory for the "
                              "command itself: the job waits until one joins (--driver-cpus, --driver-memory-gb)"
                )  # fmt: skip


def _hand_in(client: Any, chosen: SubmitCommand, line: str, folder: str, room: Room) -> str:
    """A new job; its id."""
    with _reached(chosen.address):
        return str(client.submit_job(entrypoint=line, runtime_env={"working_dir": folder},
                                     entrypoint_num_cpus=room.cpus, entrypoint_memory=room.memory))  # fmt: skip


def _until_over(client: Any, job: str, retries: int, hand_in: Callable[[], str]) -> int:
    """The exit code of a job, once it has ended. Where what carried it was lost it is handed in again, `retries` times
    in a row; a head that does not answer is waited for. Raises ClusterError where it ended without having run."""
    row, seen, begun = 0, "", time.monotonic()
    while True:
        info = _look(client, job)
        state, why = ("LOST", "the cluster does not know it any more") if info is None else (
            str(info.status), str(info.message or ""))  # fmt: skip
        if state != seen:
            print(f"{job}: {state.lower()}", flush=True)
            row = 0 if seen == "RUNNING" and time.monotonic() - begun > LASTED_S else row
            seen, begun = state, time.monotonic()
        if state == "SUCCEEDED":
            return cli.COMPLETE
        if state == "STOPPED":
            return cli.STOPPED
        if state in ("FAILED", "LOST"):
            kind = "" if info is None else str(getattr(info.error_type, "value", info.error_type))
            if kind == ENDED:
                return info.driver_exit_code or cli.FAILED
            if kind in NEVER_RAN or row >= retries:
                raise ClusterError(f"the job did not run to its end: {why.strip().partition(chr(10))[0]}", where=job,
                                   hint="see `ray job logs`; handed in again, a run goes on")  # fmt: skip
            row += 1
            again = hand_in()
            print(f"{job} was lost ({why.strip().partition(chr(10))[0][:200]}); handed in again as {again} ({row} of "
                  f"{retries})", flush=True)  # fmt: skip
            job = again
        time.sleep(POLL_S)


def _look(client: Any, job: str) -> Any:
    """What the cluster knows of a job; None: nothing. Waits for a head that does not answer, HEAD_S at most. Raises
    ClusterError then."""
    end, told = time.monotonic() + HEAD_S, False
    while True:
        try:
            return within(ANSWER_S, lambda: client.get_job_info(job))
        except OSError as error:  # the requests library's errors are, too
            problem: Exception = error
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            problem = error  # a head that is starting, or a proxy before one that is gone
        if time.monotonic() > end:
            raise ClusterError(f"the head does not answer any more: {problem}", where=client.get_address(),
                               hint="once it is back, handed in again, a run goes on") from problem  # fmt: skip
        if not told:
            print(f"the head does not answer; it is waited for, {HEAD_S / 60:.0f} minutes at most", flush=True)
            told = True
        time.sleep(POLL_S)


def _page(command: str) -> cli.Page:
    return cli.Page(f"python -m cluster submit {command}", f"Hand in what `python -m cluster {command}` does.")


def _pretrain(arguments: list[str], folder: Path) -> list[str]:
    """The resolved recipe goes along, so that its mistakes are met here, and flags need no quoting there."""
    from training.commands.recipe import read_with_recipe

    _, config = read_with_recipe(RecipeCommand, arguments, _page("pretrain"))
    from training.config import recipe_toml as recipes

    refuse_relative(paths_of(config), job=True)
    (folder / RECIPE).write_text(recipes.to_toml(config), encoding="utf-8")
    _stage_method(config.method.name, folder)
    return [RECIPE]


def _shard(arguments: list[str], folder: Path) -> list[str]:
    refuse_relative(cli.parse(ShardJob, arguments, _page("shard")).places, job=True)
    return arguments


def _evaluate(arguments: list[str], folder: Path) -> list[str]:
    refuse_relative(read_evaluate(EvaluateJob, arguments, _page("evaluate"))[0].places, job=True)
    return arguments


def _embed(arguments: list[str], folder: Path) -> list[str]:
    refuse_relative(cli.parse(EmbedJob, arguments, _page("embed")).places, job=True)
    return arguments


def _score_cfs(arguments: list[str], folder: Path) -> list[str]:
    refuse_relative(cli.parse(ScoreCfsJob, arguments, _page("score-cfs")).places, job=True)
    return arguments


_PREPARE: dict[str, Callable[[list[str], Path], list[str]]] = {
    "pretrain": _pretrain, "shard": _shard, "evaluate": _evaluate, "embed": _embed, "score-cfs": _score_cfs,
}  # fmt: skip


def _stage(folder: Path) -> None:
    """Our code beside what is there already: nothing else of the working tree is uploaded."""
    root = Path(__file__).parents[1]
    for name in PACKAGES:
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if size_mb > MOST_MB:
        raise ClusterError(f"the job's files have {size_mb:.0f} MB, more than {MOST_MB:.0f}", where=str(root),
                           hint="something large lies among the code")  # fmt: skip


def _stage_method(name: str, folder: Path) -> None:
    """A method of another package goes along: the module or package that its class lies in, and its entry point. What
    that imports besides has to be installed there."""
    from training import methods

    point = methods.entry_point_of(name)
    if point is None or point.dist is None:
        return
    top = point.module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    assert spec is not None and spec.origin is not None  # it was imported
    if spec.submodule_search_locations:
        shutil.copytree(Path(spec.origin).parent, folder / top, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(spec.origin, folder)
    metadata = folder / f"{point.dist.name.replace('-', '_')}-{point.dist.version}.dist-info"
    metadata.mkdir()
    described = f"Metadata-Version: 2.1\nName: {point.dist.name}\nVersion: {point.dist.version}\n"
    (metadata / "METADATA").write_text(described, encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{methods.GROUP}]\n{point.name} = {point.value}\n", encoding="utf-8")


def _client(address: str | None) -> tuple[Any, bool]:
    """A client of the cluster's dashboard, and whether it asked for the user's token, which Ray would not have sent."""
    from cluster.core.session import prepare

    prepare()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    refuse_mode_without_token()
    with _reached(address):
        for shown in (False, True):
            try:
                with _only(dashboard_of(address)) as url:
                    return JobSubmissionClient(url), shown
            except AuthenticationError as error:
                if shown or not show_token():
                    raise refused(address or "this machine") from error
    raise AssertionError("the second round returns or raises")


@contextmanager
def _only(url: str) -> Iterator[str]:
    """Ray lets RAY_API_SERVER_ADDRESS and RAY_ADDRESS win over the address that it is given."""
    before = os.environ.get(RAY_API_SERVER_ADDRESS)
    os.environ[RAY_API_SERVER_ADDRESS] = url
    try:
        yield url
    finally:
        del os.environ[RAY_API_SERVER_ADDRESS]
        if before is not None:
            os.environ[RAY_API_SERVER_ADDRESS] = before


@contextmanager
def _reached(address: str | None) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"the cluster takes no job: {str(error).strip().partition(chr(10))[0]}", where=address or "this machine",
            hint=SUBMIT,
        ) from error  # fmt: skip


def _in_words(job: str, address: str, arguments: Sequence[str], *, with_token: bool) -> str:
    """What to do with the job from now on. `with_token`: Ray's own commands have to be told to send it."""
    ray = f"{MODE}={WITH_TOKEN} ray" if with_token else "ray"
    again = shlex.join(["python", "-m", "cluster", "submit", *arguments])
    return "\n".join([
        f"submitted {job} to {address}",
        f"  follow:  {ray} job logs --address {address} -f {job}",
        f"  state:   {ray} job status --address {address} {job}",
        f"  stop:    {ray} job stop --address {address} {job}",
        "           (saved first, where Ray was started with RAY_JOB_STOP_WAIT_TIME_S=120 or so; its own 3 s are few)",
        f"  resume:  {again}",
    ])  # fmt: skip
