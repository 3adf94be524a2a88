"""Commands in odd surroundings: closed or full outputs, names and terminals without UTF-8, proxies, few open files."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, RefusedError, StorageError, refusal
from datapipe.core.process_setup import (
    DIRECT,
    bypass_proxies,
    numbers_in_environment,
    raise_open_files,
    refuse_fatal_numbers,
    refuse_other_text,
)
from datapipe.storage import full_url, open_store
from tests.conftest import S3Server
from tests.support.golden import ROOT

PROGRAM = """
import os, sys
from datapipe.core import cli as command
def main(words):
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    print("printed \\u884c\\udcd0")
    os.write(1, b"of a library")
    os.write(file, b"data")
    return 0
sys.exit(command.run(main, []))
"""


def _run(script: str, file: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A shell's line, in which "$RUN" is the program and its file."""
    line = script.replace("$RUN", f'"{sys.executable}" -c "$PROGRAM" "{file}"')
    return subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, timeout=120,
                          env={**os.environ, "PROGRAM": PROGRAM, **environment})  # fmt: skip


@pytest.mark.parametrize("script", ["$RUN <&- >&- 2>&-", "$RUN >&-", "$RUN"])
def test_standard_files__that_are_closed_are_no_place_for_data(tmp_path: Path, script: str) -> None:
    done = _run(script, tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data").read_bytes() == b"data"


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_output__prints_what_the_terminal_cannot(tmp_path: Path, environment: dict[str, str]) -> None:
    done = _run("$RUN", tmp_path / "data", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] in (rb"printed \u884c\udcd0", "printed 行\\udcd0".encode())


def test_output__to_a_full_disk_is_one_error(tmp_path: Path) -> None:
    done = _run("$RUN > /dev/full", tmp_path / "data")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: the operating system refused: No space left on device")
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_system__refusals_are_errors_with_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str]) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/place")

    assert cli.run(main, []) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: the operating system refused: Permission denied", "  where: /a/place",
        "  try:   give the rights to it, or choose another folder",
    ]  # fmt: skip
    with pytest.raises(PermissionError):
        cli.run(main, ["--debug"])


def test_refusal__is_of_a_kind() -> None:
    assert isinstance(refusal(OSError(errno.EROFS, "Read-only file system")), RefusedError)
    full = refusal(OSError(errno.ENOSPC, "No space left on device", 7), where="here")
    assert type(full) is StorageError and full.where == "here" and "make room" in full.hint


def test_names__that_are_no_utf8_are_refused_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    refuse_other_text(["--out", "/data/行人"])
    word = os.fsdecode(b"/data/\xd0\xd0")
    with pytest.raises(ConfigError, match="not UTF-8"):
        refuse_other_text([f"--out={word}"])
    assert cli.run(lambda _: 0, ["--out", word]) == 1
    assert r"where: /data/\xd0\xd0" in capsys.readouterr().err


def test_working_directory__may_be_gone_or_no_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd0"))
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert cli.run(lambda _: 0, []) == 1
    assert "not UTF-8" in capsys.readouterr().err
    odd.rmdir()
    assert cli.run(lambda _: 0, []) == 1
    assert "the working directory cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["s3:/bucket/prefix", "S3:/x", "gs:/x/y", "http:/host"])
def test_address__with_one_slash_is_no_folder(url: str) -> None:
    for use in (open_store, full_url):
        with pytest.raises(StorageError, match="two slashes"):
            use(url)
    assert full_url("./s3:/x").endswith("/s3:/x") and full_url("s3://bucket/x") == "s3://bucket/x"


def test_proxies__are_not_asked_for_this_machine_and_the_clouds_services(monkeypatch: pytest.MonkeyPatch) -> None:
    from requests.utils import get_environ_proxies

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    bypass_proxies()
    assert os.environ["no_proxy"] == ""
    monkeypatch.setenv("HTTP_PROXY", "http://10.0.0.1:3128")
    monkeypatch.setenv("no_proxy", "corp.example")
    bypass_proxies("10.0.0.7")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == ",".join(("corp.example", *DIRECT, "10.0.0.7"))
    assert get_environ_proxies("http://169.254.169.254/latest") == get_environ_proxies("http://10.0.0.7:8265") == {}
    assert get_environ_proxies("http://elsewhere.example")


def test_open_files__are_as_many_as_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 65_536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_proxies__are_not_asked_for_a_bucket_of_this_machine(
    tmp_path: Path, s3: S3Server, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    """boto3 writes there, obstore reads; nobody listens where the proxy is said to be."""
    write_crops(tmp_path / "crops", 4)
    url = f"s3://{s3.bucket()}/set"
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "no_proxy": "", "NO_PROXY": "", "AWS_ENDPOINT_URL": s3.endpoint}
    for words in (("shard", str(tmp_path / "crops"), "--out", url), ("verify", url)):
        line = [sys.executable, "-m", "datapipe", *words, "--workers", "1", "--storage.give-up-s", "5"]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def _reads_a_number(name: str) -> int:
    """As libraries do."""
    return int(os.environ[name])


@pytest.mark.parametrize(("value", "read"), [("abc", int), ("1.5", int), ("many", float), ("", int), ("it's", int)])
def test_number__that_a_library_cannot_read_is_one_error_with_its_name(
    value: str, read: Callable[[str], float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TIMEOUT", value)

    def main(_: list[str]) -> int:
        return int(read(os.environ["A_TIMEOUT"]))

    assert cli.run(main, []) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and f"where: A_TIMEOUT={value!r}" in said and "try:   unset A_TIMEOUT" in said
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(ValueError):
        cli.run(main, [])


def test_number__the_failing_line_tells_variables_of_one_value_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("A_TIMEOUT", "A_TIMEOUT_TOO"):
        monkeypatch.setenv(name, "soon")
    with pytest.raises(ConfigError) as told, numbers_in_environment():
        int(os.environ["A_TIMEOUT"])
    with pytest.raises(ConfigError) as guessed, numbers_in_environment():
        _reads_a_number("A_TIMEOUT_TOO")
    assert told.value.where == "A_TIMEOUT='soon'"
    assert guessed.value.where == "A_TIMEOUT='soon' or A_TIMEOUT_TOO='soon'"


@pytest.mark.parametrize("text", ["", "nowhere in the environment"])
def test_number__of_another_place_is_no_matter_of_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AN_EMPTY_ONE", "")
    with pytest.raises(ValueError), numbers_in_environment():
        int(text)


def test_number__that_pytorch_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "yes")
    with pytest.raises(ConfigError) as found, numbers_in_environment():
        raise RuntimeError("Invalid value for environment variable: TORCH_NCCL_ASYNC_ERROR_HANDLING")
    assert found.value.where == "TORCH_NCCL_ASYNC_ERROR_HANDLING='yes'"


@pytest.mark.parametrize(
    ("value", "good"),
    [("100", True), ("100MB", True), ("5Kb", True), ("", False), ("lots", False), ("-1", False), (" 7", False)],
)
def test_number__that_would_end_the_process_is_refused_before(
    value: str, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenCV aborts as it is loaded, in C++."""
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_WIDTH", value)
    loaded = subprocess.run([sys.executable, "-c", "import cv2"], cwd=ROOT, capture_output=True, timeout=120)
    assert (loaded.returncode == 0) == good
    if good:
        refuse_fatal_numbers()
    else:
        with pytest.raises(ConfigError, match="OpenCV"):
            refuse_fatal_numbers()


def test_number__that_boto3_cannot_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", "soon")
    with pytest.raises(ConfigError) as found:
        open_store("s3://bucket/x", StorageConfig(timeout_s=19)).exists("a")
    assert found.value.where == "AWS_METADATA_SERVICE_TIMEOUT='soon'"
