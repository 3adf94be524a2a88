"""What went wrong, where, and what to try: the only exceptions a user ever meets."""

import errno
import os


class UserError(Exception):
    """A mistake or a fault the user can act on. Printed without a stack trace; the process exits with 1."""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what, where, hint)
        self.what, self.where, self.hint = what, where, hint

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip between processes with all three parts."""
        return _rebuild, (type(self), self.what, self.where, self.hint)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append("  where: " + self.where.replace("\n", "\\n"))  # a name may pretend to be the next line
        if self.hint:
            lines.append(f"  try:   {self.hint}")
        return "\n".join(lines)


def _rebuild(kind: type[UserError], what: str, where: str, hint: str) -> UserError:
    return kind(what, where=where, hint=hint)


class ConfigError(UserError):
    """A setting is wrong, unknown or does not go with another one."""


class UsageError(ConfigError):
    """A command line is wrong: the process exits with 2."""


class DataError(UserError):
    """Crops, shards, manifests or checkpoints are missing, broken or of another data set."""


class StorageError(UserError):
    """A file system or an object store refused, or did not answer in time."""


class NotFoundError(StorageError):
    """The file or object is not there."""


class RefusedError(StorageError):
    """The store knows the request and forbids it: credentials or rights are missing."""


class ClusterError(UserError):
    """Processes, nodes or the scheduler failed in a way that a retry does not mend."""


class LeaseError(UserError):
    """Another process writes to the folder, or has taken it over."""


_HINTS = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT),
        "make room there; where no file is named, in the temporary folder (TMPDIR) and where the output goes",
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give the rights to it, or choose another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files: ulimit -n 4096"),
    errno.ENOMEM: "fewer workers or threads, or a machine with more memory",
    errno.EAGAIN: "allow more processes: ulimit -u, or the limit of the container",
}
"""What to try, by error number."""


def refusal(error: OSError, *, where: str = "") -> StorageError:
    """What the operating system refused, as an error that says where and what to try."""
    number = error.errno or 0
    kind = RefusedError if number in (errno.EACCES, errno.EPERM, errno.EROFS) else StorageError
    hint = _HINTS.get(number, "check the path, the rights and the free space there")
    named = error.filename if isinstance(error.filename, str | bytes) else ""
    return kind(
        f"the operating system refused: {error.strerror or error}", where=where or os.fsdecode(named), hint=hint
    )
