"""Signals: the first is remembered, a second ends the process at once."""

import signal
import subprocess
import sys

import pytest

from training.core.host import LocalHost, exit_code

CHILD = """
from training.core.host import LocalHost
with LocalHost() as host:
    print("ready", flush=True)
    while not host.preempted():
        pass
    print("heard", flush=True)
    while True:
        pass
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_host__a_second_signal_stops_at_once(number: signal.Signals, code: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.stdout.readline() == "heard\n"
    child.send_signal(number)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == code
    assert "a second signal stops at once" in errors and "the last checkpoint stays" in errors


def test_host__gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with LocalHost() as host:
        assert signal.getsignal(signal.SIGTERM) != before and not host.preempted()
    assert signal.getsignal(signal.SIGTERM) == before


def test_exit_code__says_how_it_ended() -> None:
    assert [exit_code(None), exit_code(signal.SIGTERM), exit_code(signal.SIGINT)] == [0, 75, 130]
