"""The data set's commands on stores as they are: over TLS, without rights, without conditions, on a bad line."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from datapipe.__main__ import main
from datapipe.core import cli as ends
from datapipe.core.config import StorageConfig
from datapipe.storage import retry
from tests.conftest import S3Server
from tests.end_to_end.tiny import command, finished, shards
from tests.support.faulty_proxy import Faults, FaultyProxy

EACH = ("--samples-per-shard", "17", "--workers", "1")
CROPS = 40


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    """Two folders of different crops, each called `crops`."""
    root = tmp_path_factory.mktemp("sources")
    write_crops(root / "one" / "crops", CROPS)
    write_crops(root / "two" / "crops", CROPS, seed=1)
    return root


@pytest.fixture(scope="module")
def expected(crops: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """ "one", "two" -> what an undisturbed run writes on a local disk."""
    out = tmp_path_factory.mktemp("expected")
    for name in ("one", "two"):
        shards(crops / name / "crops", str(out / name))
    return {name: files(out / name) for name in ("one", "two")}


def files(folder: Path) -> dict[str, bytes]:
    """Name -> content of everything below."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def objects(s3: S3Server, bucket: str) -> dict[str, bytes]:
    """The same below s3://bucket/set."""
    return {key.removeprefix("set/"): data for key, data in s3.objects(bucket).items()}


@pytest.mark.slow
def test_stores__over_tls(
    crops: Path,
    expected: dict[str, dict[str, bytes]],
    s3_tls: S3Server,
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """boto3 sends a body in chunks with its checksum behind only where the line is encrypted."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    bucket = s3_tls.bucket()
    url, flags = f"s3://{bucket}/set", ("--storage.endpoint-url", s3_tls.endpoint)
    picture = tmp_path / "sheet.jpg"
    shard = command("datapipe", "shard", str(crops / "one" / "crops"), "--out", url, *EACH, *flags)
    code, output, errors = finished(shard)
    assert code == 0, output + errors
    assert ends.run(main, ["verify", url, "--decode", "all", "--workers", "1", *flags]) == 0
    assert ends.run(main, ["preview", url, "--out", str(picture), *flags]) == 0
    assert objects(s3_tls, bucket) == expected["one"]
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_stores__on_a_bad_line(
    crops: Path,
    expected: dict[str, dict[str, bytes]],
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every command ends as if nothing had happened; so does a run whose source is on that line."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 1e-3)
    monkeypatch.chdir(tmp_path)
    bucket = s3.bucket()
    url, local = f"s3://{bucket}/set", tmp_path / "local" / "set"

    def tars(folder: object) -> list[str]:
        return [f"{folder}/{name}" for name in expected["one"] if name.endswith(".tar")]

    with FaultyProxy(s3.endpoint, Faults(rate=0.4, seed=5)) as proxy:
        flags = ("--storage.endpoint-url", proxy.endpoint)
        for words in (
            ("shard", str(crops / "one" / "crops"), "--out", url, *EACH),
            ("verify", url, "--decode", "all", "--workers", "1"),
            ("preview", url),
            ("shard", *tars(url), "--out", str(tmp_path / "again"), "--workers", "1"),
        ):
            assert ends.run(main, [*words, *flags]) == 0, capsys.readouterr().err
        met = dict(proxy.met)
    assert objects(s3, bucket) == expected["one"]
    assert sum(met.values()) - met[""] > 15 and len(met) > 5
    for name, data in expected["one"].items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(data)
    assert ends.run(main, ["shard", *tars(local), "--out", str(tmp_path / "directly"), "--workers", "1"]) == 0
    assert files(tmp_path / "again") == files(tmp_path / "directly")


@pytest.mark.slow
def test_stores__two_runs_in_one_place_do_not_mix(
    crops: Path, expected: dict[str, dict[str, bytes]], s3: S3Server, tmp_path: Path
) -> None:
    """On a store that ignores conditions, both brought to the moment at which they claim the place."""
    bucket = s3.bucket()
    url, together = f"s3://{bucket}/set", threading.Barrier(2)

    def meet(method: str, path: str) -> None:
        if method == "PUT" and "/requests/" in path and not together.broken:
            with suppress(threading.BrokenBarrierError):
                together.wait(timeout=60)
            together.abort()  # later claims pass

    with FaultyProxy(s3.endpoint, Faults(without=("If-None-Match",)), before=meet) as proxy:

        def shard(name: str) -> "tuple[str, ...]":
            spool = ("--spool", str(tmp_path / name), "--storage.endpoint-url", proxy.endpoint)
            return ("datapipe", "shard", str(crops / name / "crops"), "--out", url, *EACH, *spool)

        running = {name: command(*shard(name)) for name in ("one", "two")}
        ended = {name: finished(process) for name, process in running.items()}
        assert together.broken, ended
        won = [name for name, (code, _, _) in ended.items() if code == 0]
        for code, _, errors in ended.values():
            assert code in (0, 1) and (code == 0 or "another data set" in errors), errors
            assert errors.count("does not enforce create-once") == 1
        if not won:  # both took their claims back
            assert not [name for name in objects(s3, bucket) if name.endswith((".tar", ".json"))]
            code, output, errors = finished(command(*shard("two")))
            assert code == 0, output + errors
            won = ["two"]
    assert len(won) == 1
    assert objects(s3, bucket) == expected[won[0]]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("shard", "{crops}", "--out", "s3://locked/set"), ("verify", "s3://locked/set")])
def test_stores__no_right_is_one_clear_error(
    words: tuple[str, ...], crops: Path, s3_without_rights: StorageConfig
) -> None:
    given = [word.format(crops=crops / "one" / "crops") for word in words]
    began = time.monotonic()
    process = command("datapipe", *given, "--storage.endpoint-url", s3_without_rights.endpoint_url)
    code, output, errors = finished(process)
    assert code == 1 and time.monotonic() - began < StorageConfig().give_up_s
    assert errors.count("error: ") == 1 and "the store refuses access (AccessDenied)" in errors
    assert "s3://locked/set" in errors and "AWS_ACCESS_KEY_ID" in errors and "Traceback" not in errors + output
