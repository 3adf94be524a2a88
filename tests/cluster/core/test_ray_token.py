"""Whatever Ray has left behind: local runs, clusters from `ray start --head`, and jobs handed in to them."""

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.core.ray_token import MODE, PATH, TOKEN, private_token
from tests.cluster.ray_head import Head, ray_head, ray_words, without_ray
from tests.end_to_end.tiny import finished
from tests.support.golden import ROOT
from tests.support.warm_python import python

Words = tuple[str, ...]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder of somebody who has never used Ray."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_crops(folder / "crops", 6)
    return folder


def run(home: Path, *words: str, **changes: str) -> tuple[int, str, str]:
    """(exit code, output, errors) of one of our commands in a shell that says nothing about Ray."""
    environment = without_ray(HOME=str(home), OMP_NUM_THREADS="1", **changes)
    return finished(subprocess.Popen([python(), "-m", "cluster", *words], cwd=ROOT, text=True, env=environment,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE), timeout_s=480)  # fmt: skip


def sharding(crops: Path, out: str) -> Words:
    return "shard", str(crops / "crops"), "--out", str(crops / out), "--workers", "1"


@pytest.mark.slow
def test_local_run__leaves_no_token_behind(home: Path, crops: Path) -> None:
    code, output, errors = run(home, *sharding(crops, "local"))
    assert code == 0, errors
    assert "6 crops" in output and not (home / ".ray").exists()


@pytest.fixture(scope="module")
def asking(home: Path) -> Iterator[Head]:
    """`ray start --head` in the same shell where Ray itself once made a token: it asks for that."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 2)
    with ray_head(without_ray(HOME=str(home), OMP_NUM_THREADS="1")) as head:
        yield head


@pytest.mark.slow
def test_submit__shows_the_token_that_a_cluster_asks_for(home: Path, crops: Path, asking: Head) -> None:
    code, output, errors = run(home, "submit", "--address", asking.dashboard, *sharding(crops, "job"))
    assert code == 0, errors
    assert "6 crops in 1 shard" in followed(home, output)


def followed(home: Path, output: str) -> str:
    """What a job says until it ends, by the line that `submit` has printed."""
    (follow,) = (line.split(maxsplit=1)[1] for line in output.splitlines() if "follow:" in line)
    assert follow.startswith("RAY_AUTH_MODE=token ray job logs ")
    words = follow.replace(" ray ", f" {shlex.join(ray_words())} ")
    logs = subprocess.run(words, shell=True, env=without_ray(HOME=str(home)), capture_output=True, text=True)
    return logs.stdout + logs.stderr


@pytest.mark.slow
def test_submit__without_an_address_goes_to_the_cluster_of_this_machine(home: Path, crops: Path, asking: Head) -> None:
    """As the README has it: `ray start --head`, then `submit`, in a shell with nothing but what Ray itself left."""
    code, output, errors = run(home, "submit", *sharding(crops, "here"), RAY_TMPDIR=str(asking.session.parent))
    assert code == 0, errors
    assert f" to {asking.dashboard}\n" in output and "6 crops in 1 shard" in followed(home, output)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "of"), [("RAY_API_SERVER_ADDRESS", 0), ("RAY_ADDRESS", 0), ("RAY_ADDRESS", 1)])
def test_submit__without_an_address_goes_by_the_environment(
    name: str, of: int, home: Path, crops: Path, asking: Head
) -> None:
    """The dashboard's address, or the head's."""
    code, output, errors = run(home, "submit", *sharding(crops, "named"), **{name: asking[of]})
    assert code == 0, errors
    assert f" to {asking.dashboard}\n" in output


@pytest.mark.slow
def test_join__shows_the_token_that_a_cluster_asks_for(home: Path, crops: Path, asking: Head) -> None:
    code, output, errors = run(home, *sharding(crops, "joined"), "--address", asking.address)
    assert code == 0, errors
    assert "cluster: 1 machine, 2 CPUs" in output and "6 crops in 1 shard" in output


@pytest.mark.slow
def test_join__shows_no_token_to_a_cluster_that_asks_for_none(
    home: Path, crops: Path, asking: Head, tmp_path: Path
) -> None:
    """Its workers could not answer a driver that asks them for one."""
    with ray_head(without_ray(HOME=str(tmp_path), OMP_NUM_THREADS="1")) as head:
        code, output, errors = run(home, *sharding(crops, "open"), "--address", head.address)
    assert code == 0, errors
    assert "6 crops in 1 shard" in output


TRIED = """
import sys
from cluster.submit import _client
from cluster.core.ray_token import MODE, PATH, TOKEN, _set
from cluster.core.session import _join
from datapipe.core.errors import ClusterError

for changes in ({}, {TOKEN: "fedcba9876543210" * 2}, {TOKEN: "0" * 32, MODE: "disabled"}, {MODE: "token"},
                {PATH: "/nowhere/token"}):
    for reach, address in ((_client, sys.argv[1]), (_join, sys.argv[2])):
        _set({MODE: None, PATH: None, TOKEN: None} | changes)
        try:
            reach(address)
        except ClusterError as error:
            print(error.what)
"""


@pytest.mark.slow
def test_token__missing_or_wrong_is_one_clear_error(tmp_path: Path, asking: Head) -> None:
    """For whoever hands in a job and for whoever joins: no token, another one, a mode, a file that is absent."""
    tried = subprocess.run([python(), "-c", TRIED, asking.dashboard, asking.address], cwd=ROOT, text=True,
                           env=without_ray(HOME=str(tmp_path)), capture_output=True)  # fmt: skip
    none = "the cluster wants Ray's token, and there is none here"
    another = "the cluster refuses this token: it has another one"
    disabled = "the cluster wants Ray's token, and RAY_AUTH_MODE=disabled sends none"
    to_be_sent = "RAY_AUTH_MODE=token, and there is no token here"
    expected = [said for said in (none, another, disabled, to_be_sent, none) for _ in range(2)]
    assert (tried.returncode, tried.stdout.splitlines()) == (0, expected), tried.stderr
    assert not (tmp_path / ".ray").exists()


@pytest.mark.parametrize("mode", [None, "token"])
def test_private_token__is_in_force_only_within(
    mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (MODE, PATH, TOKEN):
        monkeypatch.delenv(name, raising=False)
    if mode:
        monkeypatch.setenv(MODE, mode)
    monkeypatch.setenv(TOKEN, "of the user")
    with private_token(str(tmp_path)):
        assert (os.environ[MODE], os.environ[PATH], TOKEN in os.environ) == ("token", f"{tmp_path}/token", False)
        assert len((tmp_path / "token").read_text()) == 64 and (tmp_path / "token").stat().st_mode & 0o77 == 0
    assert (os.environ.get(MODE), os.environ.get(PATH), os.environ[TOKEN]) == (mode, None, "of the user")


def test_private_token__none_where_ray_is_told_to_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE, "disabled")
    with private_token(str(tmp_path)):
        assert os.environ[MODE] == "disabled" and not list(tmp_path.iterdir())
