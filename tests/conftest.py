"""What tests share: an S3-compatible server, folders of crops, real crops where there are any, and an honest last line.

GOLDEN and TEST_CROPS name the folders of golden vectors and of real crops (default: ../shared/golden, ../shared/crops).
"""

import json
import logging
import os
import signal
import urllib.request

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: test processes share few cores
os.environ.setdefault("RAY_worker_niceness", "0")  # as the tests that wait for them

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app
from werkzeug.serving import make_server

from datapipe.core.config import StorageConfig
from tests.datapipe.crop_set import jpegs
from tests.support import warm_python
from tests.support.golden import ABSENT, ROOT

HOST = IPv4Address("127.0.0.1")
CROPS_ABSENT = "real crops absent"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class S3Server:
    """A server of this test run, and a client that is not ours."""

    endpoint: str
    client: Any

    @property
    def storage(self) -> StorageConfig:
        """Our configuration for it; few tries, so that errors come soon."""
        return StorageConfig(endpoint_url=self.endpoint, attempts=2, timeout_s=20)

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"bucket-{uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Everything in a bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return {key: self.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3-compatible server on a free port of the loopback address; processes started by tests reach it too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        yield S3Server(endpoint, boto3.client("s3", endpoint_url=endpoint))
        server.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of an authority of our own making. Beside it lies what it signed for 127.0.0.1, server.pem, with
    the server's key, key.pem."""
    folder = tmp_path_factory.mktemp("tls")
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    for name, key, address in (("certificate", authority, None), ("server", server, x509.IPAddress(HOST))):
        made = _certificate(name, key, authority, address)
        (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(server.private_bytes(*plain))
    return folder / "certificate.pem"


def _certificate(
    name: str, key: Any, authority: Any, address: x509.GeneralName | None, *, authority_too: bool = False
) -> x509.Certificate:
    """Signed by the authority "certificate"; with an address for a server, without one for the authority itself."""
    now = datetime.now(UTC)
    subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, of)]) for of in (name, "certificate"))
    made = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=address is None or authority_too, path_length=None), critical=True)
    )
    if address is not None:
        made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return made.sign(authority, hashes.SHA256())


@pytest.fixture(scope="session")
def s3_tls(s3: S3Server, certificate: Path) -> Iterator[S3Server]:
    """The same store over https; AWS_CA_BUNDLE has to name the `certificate`."""
    with over_tls(certificate.with_name("server.pem"), certificate.with_name("key.pem"), certificate) as server:
        yield server


@contextmanager
def over_tls(own: Path, key: Path, authority: Path) -> Iterator[S3Server]:
    """The S3-compatible server of this process over https, with a certificate of its own that the authority signed."""
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=True, ssl_context=(str(own), str(key)))
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"https://127.0.0.1:{server.server_port}"
    yield S3Server(endpoint, boto3.client("s3", endpoint_url=endpoint, verify=str(authority)))
    server.shutdown()


@pytest.fixture(scope="session")
def s3_self_signed(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, Path]]:
    """The same store with a certificate that it signed itself, as an authority, and that certificate: what `openssl req
    -x509` makes."""
    folder, key = tmp_path_factory.mktemp("self-signed"), ec.generate_private_key(ec.SECP256R1())
    own = _certificate("certificate", key, key, x509.IPAddress(HOST), authority_too=True)
    (folder / "own.pem").write_bytes(own.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*plain))
    with over_tls(folder / "own.pem", folder / "key.pem", folder / "own.pem") as server:
        yield server, folder / "own.pem"


@pytest.fixture
def s3_without_rights(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageConfig]:
    """Configuration of a server that checks signatures and rights; the user of the environment may list no more than
    the names of buckets. `s3://locked/name` is there."""
    s3.client.create_bucket(Bucket="locked")
    s3.client.put_object(Bucket="locked", Key="name", Body=b"content")
    iam = boto3.client("iam", endpoint_url=s3.endpoint)
    user = f"user-{uuid4().hex[:8]}"
    iam.create_user(UserName=user)
    rights = {"Effect": "Allow", "Action": "s3:ListAllMyBuckets", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [rights]})
    iam.put_user_policy(UserName=user, PolicyName="names", PolicyDocument=policy)
    key = iam.create_access_key(UserName=user)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    _check_rights(s3, "0")
    yield StorageConfig(endpoint_url=s3.endpoint, timeout_s=17)
    _check_rights(s3, "inf")


def _check_rights(s3: S3Server, after_requests: str) -> None:
    plain = {"Content-Type": "text/plain"}
    order = urllib.request.Request(f"{s3.endpoint}/moto-api/reset-auth", after_requests.encode(), plain)
    urllib.request.urlopen(order).close()


@pytest.fixture(scope="session")
def write_crops() -> Callable[..., dict[str, bytes]]:
    """write_crops(folder, count, seed=0): Market-style JPEG crops of two cameras; returns name -> bytes."""

    def write(folder: Path, count: int, seed: int = 0) -> dict[str, bytes]:
        folder.mkdir(parents=True, exist_ok=True)
        crops = {
            f"{row // 4 + 1:04d}_c{row % 2 + 1}s1_{row:06d}_00.jpg": data for row, data in enumerate(jpegs(count, seed))
        }
        for name, data in crops.items():
            (folder / name).write_bytes(data)
        return crops

    return write


@pytest.fixture(scope="session")
def real_crops() -> Path:
    """The folder of real crops in the Market-1501 layout; without it the check is left out, and counted."""
    folder = Path(os.environ.get("TEST_CROPS") or ROOT.parent / "shared" / "crops") / "cuhk03"
    if not folder.is_dir():
        pytest.skip(f"{CROPS_ABSENT}: {folder.name}")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """One interpreter with the slow imports done, for all processes of a run. They hear signals that a run in the
    background, or under nohup, ignores."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        running = ExitStack()
        running.enter_context(warm_python.started())
        config.add_cleanup(running.close)
        config.add_cleanup(lambda: _say_what_started_cold(config))


def _say_what_started_cold(config: pytest.Config) -> None:
    """They cost the run seconds each: a variable that a test sets may be the cause."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and (found := warm_python.started_cold()):
        listed = ", ".join(f"{count} for {why}" for why, count in sorted(found.items()))
        reporter.write_line(f"processes that had to import by themselves: {listed}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of every test run: how many checks were left out for want of golden vectors or real crops."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    reasons = [
        str(report.longrepr[2]) for report in reporter.stats.get("skipped", ()) if isinstance(report.longrepr, tuple)
    ]
    kinds = Counter(kind for reason in reasons for kind in (ABSENT, CROPS_ABSENT) if kind in reason)
    for reason in reasons:
        if ABSENT not in reason and CROPS_ABSENT not in reason:
            reporter.write_line(f"left out: {reason}")
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    reporter.write_line(f"checks left out for want of golden vectors or real crops: {kinds.total()} ({listed})")
