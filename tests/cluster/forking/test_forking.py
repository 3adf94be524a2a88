"""Workers of Ray are forked by a server of their machine that has imported what they need, or start by themselves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.forking import client
from cluster.forking.server import LOAD, TITLE
from cluster.train import imports_ahead
from tests.support.golden import ROOT

CLIENT = Path(client.__file__)
REAL = str(Path(sys.prefix, "bin", "python"))
PATIENCE_S = 300
SAY = """
import json, os, resource, sys
mask = os.umask(0)
print(json.dumps({
    "parent": os.getppid(), "pid": os.getpid(), "words": sys.argv, "path": sys.path[0], "name": __name__,
    "ahead": "training.trainer.pretrain" in sys.modules, "folder": os.getcwd(), "own": os.environ.get("OWN"),
    "group": os.getpgid(0), "mask": mask, "cores": sorted(os.sched_getaffinity(0)), "python": sys.executable,
    "files": resource.getrlimit(resource.RLIMIT_NOFILE), "open": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
}), flush=True)
"""
DRAW = """
import numpy, random, ray, threading, uuid
print(numpy.random.random(), random.random(), uuid.uuid4(), ray.NodeID.from_random().hex())
thread = threading.Thread(target=lambda: print(ray.NodeID.from_random().hex()))
thread.start()
thread.join()
"""
WAIT = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"


@pytest.fixture(scope="module")
def raylet() -> Iterator[subprocess.Popen[bytes]]:
    """What servers of these tests end with, in the place of a machine's raylet."""
    with subprocess.Popen(["sleep", "10000"]) as process:
        try:
            yield process
        finally:
            process.kill()


def environment(raylet: int, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("OWN", "PYTEST_CURRENT_TEST")}
    return {**kept, client.RAYLET: str(raylet), imports_ahead.CORES: "1", imports_ahead.NEEDS: "", "TEST": __name__,
            LOAD: "cluster.train.imports_ahead.load_for_ray", "PYTHONPATH": str(ROOT), **changes}  # fmt: skip


def words(*program: str) -> list[str]:
    return [REAL, "-ISE", str(CLIENT), REAL, *program]


def run(raylet: int, *program: str, changes: dict[str, str] | None = None, **named: Any) -> Any:
    return subprocess.run(words(*program), env=environment(raylet, **(changes or {})), text=True, capture_output=True,
                          timeout=PATIENCE_S, **named)  # fmt: skip


def said(raylet: int, **named: Any) -> dict[str, Any]:
    done = run(raylet, "-c", SAY, **named)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def servers(raylet: int) -> list[psutil.Process]:
    """Those that end with it and have their imports done."""
    found = [process for process in psutil.process_iter(["cmdline"])
             if " ".join(process.info["cmdline"] or ()).split() == [TITLE, str(raylet)]]  # fmt: skip
    return found


@pytest.mark.slow
def test_process__is_forked_by_one_server_and_has_all_that_its_client_had(
    raylet: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    script = tmp_path / "program" / "say.py"
    script.parent.mkdir()
    script.write_text(SAY)
    core = min(os.sched_getaffinity(0))

    def small() -> None:
        os.umask(0o027)
        os.sched_setaffinity(0, [core])

    before = said(raylet.pid)
    assert before["ahead"] and before["parent"] in [one.pid for one in servers(raylet.pid)]
    by_itself = subprocess.run([REAL, str(script), "a", "ä"], env=environment(raylet.pid), text=True,
                               capture_output=True, preexec_fn=small, check=True)  # fmt: skip
    found = run(raylet.pid, str(script), "a", "ä", preexec_fn=small)
    assert found.returncode == 0, found.stderr
    real, forked = json.loads(by_itself.stdout), json.loads(found.stdout)
    assert forked.pop("ahead") and not real.pop("ahead")
    differ = {name for name in real if real[name] != forked[name]}
    assert differ <= {"parent", "pid"} and forked["words"] == [str(script), "a", "ä"], (real, forked)
    assert forked["mask"] == 0o027 and forked["cores"] == [core]


@pytest.mark.slow
def test_processes__draw_different_numbers(raylet: subprocess.Popen[bytes]) -> None:
    drawn = [run(raylet.pid, "-c", DRAW).stdout.split() for _ in range(2)]
    assert all(one != other for one, other in zip(*drawn, strict=True))


@pytest.mark.slow
def test_clients__that_come_at_once_share_a_server_and_others_do_not(raylet: subprocess.Popen[bytes]) -> None:
    given = environment(raylet.pid, OWN="another job's")
    both = [subprocess.Popen(words("-c", SAY), env=given, text=True, stdout=subprocess.PIPE) for _ in range(4)]
    found = [json.loads(process.communicate(timeout=PATIENCE_S)[0]) for process in both]
    assert {process.returncode for process in both} == {0}
    assert all(one["ahead"] and one["own"] == "another job's" for one in found)
    assert len({one["parent"] for one in found}) == 1
    assert said(raylet.pid)["parent"] not in {one["parent"] for one in found}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
@pytest.mark.parametrize("to", ["the client", "the process"])
def test_signal__ends_both(number: int, to: str, raylet: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(words("-c", WAIT), env=environment(raylet.pid), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        inner = psutil.Process(int(process.stdout.readline()))
        assert inner.pid != process.pid
        os.kill(process.pid if to == "the client" else inner.pid, number)
        assert process.wait(PATIENCE_S) == -number
        assert psutil.wait_procs([inner], timeout=PATIENCE_S)[1] == []
    assert run(raylet.pid, "-c", "raise SystemExit(7)").returncode == 7, "the server goes on"


@pytest.mark.slow
def test_server__ends_with_its_raylet() -> None:
    with subprocess.Popen(["sleep", "10000"]) as own:
        said(own.pid)
        started = servers(own.pid)
        assert len(started) == 1
        own.kill()
        assert psutil.wait_procs(started, timeout=PATIENCE_S)[1] == []


def test_process__starts_by_itself_outside_ray() -> None:
    given = environment(0)
    del given[client.RAYLET]
    with subprocess.Popen(words("-c", SAY), env=given, text=True, stdout=subprocess.PIPE) as process:
        found = json.loads(process.communicate(timeout=PATIENCE_S)[0])
    assert process.returncode == 0 and not found["ahead"] and found["pid"] == process.pid


def test_process__starts_by_itself_where_the_imports_of_the_server_fail(
    raylet: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """One server is asked, and refuses all: each that tried would take as long as the imports."""
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'tried')!r}, 'a').write('x')\nraise ImportError('none')")
    changes = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for _ in range(3):
        found = said(raylet.pid, changes=changes)
        assert not found["ahead"]
    assert (tmp_path / "tried").read_text() == "x"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can listen as another user")
def test_process__starts_by_itself_where_another_user_listens(
    raylet: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = environment(raylet.pid, OWN="listened for")
    for name in set(os.environ) - set(given):
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    listen = """
import os, socket, sys
os.setuid(65534)
listening = socket.socket(socket.AF_UNIX)
listening.bind(bytes.fromhex(sys.argv[1]))
listening.listen()
print(1, flush=True)
input()
"""
    line = [REAL, "-c", listen, client.address(REAL).hex()]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None and listener.stdout.readline()
        done = run(raylet.pid, "-c", SAY, changes={"OWN": "listened for"}, cwd=tmp_path)
        listener.communicate(b"\n")
    assert done.returncode == 0 and not json.loads(done.stdout)["ahead"]
    assert "no process is forked: a process of another user or container listens" in done.stderr


def test_same_owner__is_no_process_that_this_one_cannot_see() -> None:
    apart = ["unshare", "--fork", "--pid"]  # as a container has its own processes
    if subprocess.run([*apart, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no namespaces can be made here")
    connect = f"""
import socket, sys
sys.path.insert(0, {str(ROOT)!r})
from cluster.forking.client import same_owner
server = socket.socket(socket.AF_UNIX)
server.connect(bytes.fromhex(sys.argv[1]))
print(same_owner(server))
"""
    name = b"\0reid_test_%d" % os.getpid()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen()
        found = [subprocess.run([*prefix, REAL, "-c", connect, name.hex()], capture_output=True, text=True).stdout
                 for prefix in ([], apart)]  # fmt: skip
    assert found == ["True\n", "False\n"]


@pytest.mark.parametrize("key", ["pip", "conda", "uv", "py_executable", "container", "image_uri"])
def test_interpreter__is_the_jobs_own_where_it_says_which(key: str) -> None:
    assert imports_ahead.interpreter({key: ["numpy"]}) == ""
    assert imports_ahead.interpreter({"env_vars": {"A": "b"}, "working_dir": "."}) != ""


def test_interpreter__is_the_one_at_hand_on_machines_where_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def called() -> str:
        line = f"exec {imports_ahead.interpreter({})} -c 'import sys; print(sys.argv, sys.flags.isolated)'"
        return subprocess.run(["bash", "-c", line], text=True, capture_output=True, check=True).stdout

    monkeypatch.delenv(client.RAYLET, raising=False)
    monkeypatch.setattr(sys, "executable", REAL)
    assert re.fullmatch(r"\['-c'\] 0\n", called())
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert called() == "['-c'] 0\n"
    call = "import subprocess, sys; sys.exit(subprocess.run(['bash', '-c', sys.argv[1]]).returncode)"
    line = f"exec {imports_ahead.interpreter({})} -c 'import sys; print(sys.executable)'"
    raylet = [sys._base_executable, "-c", call, line, f"--python_worker_command={REAL} setup_worker.py"]  # type: ignore[attr-defined]
    assert subprocess.run(raylet, text=True, capture_output=True).stdout == f"{REAL}\n"
    monkeypatch.setattr(sys, "executable", "/a folder/python")
    assert imports_ahead.interpreter({}) == ""
