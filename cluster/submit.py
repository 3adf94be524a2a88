"""Handing in our commands as Ray jobs."""

import importlib.util
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.core.addresses import RAY_API_SERVER_ADDRESS, SUBMIT, dashboard_of
from cluster.core.arguments import EmbedJob, EvaluateJob, ScoreCfsJob, ShardJob, SubmitCommand
from cluster.core.job_paths import paths_of, refuse_relative
from cluster.core.ray_token import MODE, WITH_TOKEN, refuse_mode_without_token, refused, show_token
from datapipe.core import cli
from datapipe.core.errors import ClusterError
from training.commands.arguments import RecipeCommand
from training.commands.entry_points import read_evaluate

PACKAGES = ("cluster", "datapipe", "training")
MOST_MB = 20.0
"""Megabytes (10^6 bytes) that a job may upload. Our code is one."""
RECIPE = "recipe.toml"


def submit(chosen: SubmitCommand, rest: Sequence[str]) -> int:
    """Hand in a command with the rest of its line as a Ray job. Raises UserError for what could not run there."""
    with tempfile.TemporaryDirectory(prefix="reid_job_") as folder:
        words = _PREPARE[chosen.command](list(rest), Path(folder))
        _stage(Path(folder))
        client, with_token = _client(chosen.address)
        with _reached(chosen.address):
            job = client.submit_job(entrypoint=shlex.join(["python", "-m", "cluster", chosen.command, *words]),
                                    runtime_env={"working_dir": folder})  # fmt: skip
    address = ["--address", chosen.address] if chosen.address else []
    print(_in_words(job, client.get_address(), [*address, chosen.command, *rest], with_token=with_token))
    return 0


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
