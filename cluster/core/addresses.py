"""Addresses of clusters: understood, and answered by somebody within seconds, before Ray tries them for minutes."""

import os
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

from cluster.core.ray_internals import cluster_of_this_machine, dashboard_of_head
from datapipe.core.errors import ClusterError
from datapipe.core.process_setup import bypass_proxies

T = TypeVar("T")
RAY_ADDRESS, RAY_API_SERVER_ADDRESS = "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"
CONNECT_S = 5.0
"""Seconds for a machine to take a connection."""
ANSWER_S = 15.0
"""Seconds for Ray's head behind it to answer; a busy one may take some."""
LOOK_UP_S = 10.0
"""Seconds for a host's name to be found."""
PORTS = {"http": 80, "https": 443}
JOIN = "`ray start --head` prints the address (HOST:6379) on its first machine; without --address and RAY_ADDRESS, " \
       "Ray runs inside this process"  # fmt: skip
SUBMIT = "--address http://HEAD:8265, the dashboard's; `ray start --head` starts one on its first machine"


class Address(NamedTuple):
    """Where somebody is to listen."""

    host: str
    port: int
    given: str
    """As the user wrote it, with where it comes from if that is not the command line."""


def head_of(address: str, *, hint: str = JOIN) -> str:
    """The "host:port" of the head (GCS) of a running cluster, where one answers.

    `address` is "host:port", or "auto" for the cluster that this machine belongs to. Raises ClusterError with the hint
    for addresses of other kinds, and where nobody answers in time.
    """
    given = _with_origin(address)
    scheme, separator, _ = address.partition("://")
    if separator and scheme in PORTS:
        raise ClusterError("this is the address of a dashboard, which takes jobs; it cannot be joined", where=given,
                           hint=f"`python -m cluster submit ...` hands in jobs there; {hint}")  # fmt: skip
    if separator:
        raise ClusterError(f"clusters are not joined through {scheme}://", where=given, hint=hint)
    head = _split(_of_this_machine(given, hint) if address == "auto" else address, given, hint)
    _connect(head, hint)
    _greet(head, hint)
    return f"[{head.host}]:{head.port}" if ":" in head.host else f"{head.host}:{head.port}"


def dashboard_of(address: str | None) -> str:
    """The URL of the dashboard that takes jobs, where one answers.

    `address`: the one given, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else the cluster of this machine. It may be
    the dashboard's, the head's, or "auto". Raises ClusterError where nobody answers in time.
    """
    chosen = address or os.environ.get(RAY_API_SERVER_ADDRESS) or os.environ.get(RAY_ADDRESS) or "auto"
    given = _with_origin(chosen)
    scheme, separator, _ = chosen.partition("://")
    url = chosen
    if not separator:
        url = _dashboard_from_head(head_of(chosen, hint=SUBMIT))
    elif scheme not in PORTS:
        raise ClusterError(f"jobs are not handed in through {scheme}://", where=given, hint=SUBMIT)
    dashboard = _split_url(url, given)
    try:
        _connect(dashboard, SUBMIT)
    except ClusterError:
        if not _proxy_for(url):
            raise
    else:
        bypass_proxies(dashboard.host)  # it is reached without them
    _ask(url, given)
    return url


def _with_origin(address: str) -> str:
    for name in (RAY_API_SERVER_ADDRESS, RAY_ADDRESS):
        if os.environ.get(name) == address:
            return f"{name}={address}"
    return address


def _of_this_machine(given: str, hint: str) -> str:
    """The address of the cluster that was started on this machine last, as far as the machine remembers, else of one
    that runs here."""
    listed = os.environ.pop(RAY_ADDRESS, None)  # Ray lets it win over "auto"
    try:
        return cluster_of_this_machine()
    except (ConnectionError, ValueError) as error:
        raise ClusterError("there is no Ray cluster on this machine", where=given, hint=hint) from error
    finally:
        if listed is not None:
            os.environ[RAY_ADDRESS] = listed


def _dashboard_from_head(head: str) -> str:
    from ray.exceptions import AuthenticationError

    try:
        return within(ANSWER_S, lambda: dashboard_of_head(head))
    except AuthenticationError:
        raise
    except Exception as error:
        raise ClusterError("the cluster does not say where its dashboard is", where=head, hint=SUBMIT) from error


def _split(address: str, given: str, hint: str) -> Address:
    """Split "10.0.0.1:6379", "head:6379" or "[fe80::1]:6379" into host and port."""
    try:
        parts = urlsplit(f"//{address.strip()}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.path or parts.username is not None:
        raise ClusterError("the address of a cluster is HOST:PORT", where=given, hint=hint)
    return Address(host, port, given)


def _split_url(url: str, given: str) -> Address:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or PORTS[parts.scheme]
    except (KeyError, ValueError):
        host, port = None, 0
    if not host:
        raise ClusterError("the address of a dashboard is http://HOST:PORT", where=given, hint=SUBMIT)
    return Address(host, port, given)


def _connect(address: Address, hint: str) -> None:
    """Returns if somebody takes a TCP connection there, at any address of the host."""
    try:
        resolved = within(LOOK_UP_S, lambda: socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM))
    except (OSError, TimeoutError, UnicodeError) as error:
        raise ClusterError(f"no Ray cluster is reached: the name of the host is not found ({_reason(error)})",
                           where=address.given, hint=hint) from error  # fmt: skip
    refused: OSError | None = None
    for family, kind, protocol, _, place in resolved:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(CONNECT_S / len(resolved))
                probe.connect(place)
                return
        except OSError as error:
            refused = error
    _nobody(address, hint, refused)


def _nobody(address: Address, hint: str, error: OSError | None) -> NoReturn:
    why = f"nobody answers at {address.host}:{address.port}" + (f" ({_reason(error)})" if error else "")
    raise ClusterError(f"no Ray cluster is reached: {why}", where=address.given, hint=hint) from error


def _greet(address: Address, hint: str) -> None:
    """Returns if whoever listens there speaks Ray's protocol (gRPC). With Ray's TLS its own handshake tells."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false", ""):
        return
    import grpc

    host = f"[{address.host}]" if ":" in address.host else address.host
    with grpc.insecure_channel(f"{host}:{address.port}", options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError as error:
            raise ClusterError(
                f"who listens at {address.host}:{address.port} is not the head of a Ray cluster",
                where=address.given, hint=hint,
            ) from error  # fmt: skip


def _ask(url: str, given: str) -> None:
    """Returns if somebody answers an HTTP request there, whatever the answer is."""
    import requests

    try:
        requests.get(f"{url.rstrip('/')}/api/version", timeout=ANSWER_S).close()
    except requests.exceptions.SSLError:
        return  # Ray says it in its own words
    except requests.exceptions.RequestException as error:
        proxy = _proxy_for(url)
        raise ClusterError(
            "who listens there does not answer as a dashboard does" + (f" (asked through {proxy})" if proxy else ""),
            where=given, hint=SUBMIT + ("; or no_proxy=HEAD" if proxy else ""),
        ) from error  # fmt: skip


def _proxy_for(url: str) -> str:
    from requests.utils import get_environ_proxies

    return str(get_environ_proxies(url).get(urlsplit(url).scheme, ""))


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError when it takes longer, and goes on in a thread of its own."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001  (raised below)
            failed.append(error)

    thread = threading.Thread(target=run, name="with a deadline", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return done[0]
