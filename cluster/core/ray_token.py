"""Ray's token: which one a Ray of ours asks for, and when one is shown to a cluster.

Left to itself, Ray 2.60 makes ~/.ray/auth_token when it is started inside a process, and from then on every
`ray start --head` asks for that token, which others do not know to send. So the mode is always said here: a Ray inside
this process has a token of its own, which ends with it; a running cluster is shown the user's where it asks for one.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from cluster.core.ray_internals import has_token, read_token_again
from datapipe.core.errors import ClusterError

MODE, PATH, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"
"""What Ray reads: "token" or "disabled"; where the token is; the token itself, before any file."""
WITH_TOKEN = "token"
HINT = "its token, as `ray get-auth-token` prints it there, in ~/.ray/auth_token or where RAY_AUTH_TOKEN_PATH says"


@contextlib.contextmanager
def private_token(folder: str) -> Iterator[None]:
    """A token for a Ray inside this process and its workers, in `folder`; the user's is neither read nor made.

    RAY_AUTH_MODE=disabled stays what it is. Ray has to be ended before this is left.
    """
    if os.environ.get(MODE, "").lower() == "disabled":
        yield
        return
    file = Path(folder, "token")
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    before = {name: os.environ.get(name) for name in (MODE, PATH, TOKEN)}
    try:
        _set({MODE: WITH_TOKEN, PATH: str(file), TOKEN: None})
        yield
    finally:
        _set(before)


def show_token() -> bool:
    """Send the user's token from now on, unless RAY_AUTH_MODE says whether to; True where that has changed something.

    Only for a cluster that has asked: this process then asks others for it, too, and workers of a cluster without a
    token could not answer.
    """
    if os.environ.get(MODE) or not has_token():
        return False
    _set({MODE: WITH_TOKEN})
    return True


def refuse_mode_without_token() -> None:
    """Raises ClusterError where a token is to be sent and there is none: Ray would abort this process."""
    mode = os.environ.get(MODE, "")
    if mode.lower() == WITH_TOKEN and not has_token():
        raise ClusterError(f"{MODE}={mode}, and there is no token here", hint=HINT)


def refused(where: str) -> ClusterError:
    """What to tell where a cluster has asked for a token and got none, or another one."""
    mode = os.environ.get(MODE, "")
    if not has_token():
        return ClusterError("the cluster wants Ray's token, and there is none here", where=where, hint=HINT)
    if mode and mode.lower() != WITH_TOKEN:
        return ClusterError(f"the cluster wants Ray's token, and {MODE}={mode} sends none", where=where,
                            hint=f"unset {MODE}")  # fmt: skip
    return ClusterError("the cluster refuses this token: it has another one", where=where, hint=HINT)


def _set(variables: dict[str, str | None]) -> None:
    """Change the environment of this process, and have Ray read it again."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    read_token_again()
