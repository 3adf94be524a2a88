"""The help of a command at 80 columns: purpose, example, common flags; rare groups in a line each, or all with
`--help-all`."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from datapipe.core.cli.flags import HELP, HELP_ALL, Flag, bare

COLUMNS, LEFT = 80, 28
"""Widths in characters: of a help page, and of its column of flags."""


@dataclasses.dataclass(frozen=True)
class Page:
    """What a command says of itself."""

    prog: str
    """How it is called: "python -m datapipe verify"."""
    about: str
    """One sentence: what it is for."""
    example: str = ""
    """Words that may follow `prog`."""
    more: tuple[str, ...] = ()
    """Lines below the example: recipes that come along, what else may follow."""
    common: tuple[str, ...] = ()
    """Flags listed by `--help`; empty: all without a prefix."""


def page_of(command: Callable[[list[str]], int], example: str = "", *, name: str = "", **more: Any) -> Page:
    """The page of a command: called by the package and the name of its function, or `name`, its docstring's first
    sentence the purpose."""
    package, own = command.__module__.partition(".")[0], name or command.__name__
    return Page(f"python -m {package} {own}", " ".join((command.__doc__ or "").split()), example, **more)


def wants_help(words: Sequence[str]) -> bool:
    """Is help asked for, anywhere on the line?"""
    return any(word in (*HELP, HELP_ALL) for word in words)


def short(page: Page, known: Sequence[Flag]) -> str:
    """Usage in a few lines, for a line without any word."""
    lines = [f"usage: {_call(page, known)}", page.about]
    if page.example:
        lines.append(f"example: {page.prog} {page.example}")
    return "\n".join([*lines, f"`{page.prog} --help` says more."])


def text(page: Page, known: Sequence[Flag], words: Sequence[str]) -> str:
    """The page that `words` ask for: `--help`, `--help-all`, or either with names of groups, which then are all."""
    groups = list(dict.fromkeys(flag.group for flag in known if flag.group))
    chosen = [word for word in words if word in groups]
    lines = [*_command(f"usage: {_call(page, known)}"), "", *textwrap.wrap(page.about, COLUMNS)]
    if page.example:
        lines += ["", *_command(f"example: {page.prog} {page.example}")]
    for line in page.more:
        lines += textwrap.wrap(line, COLUMNS, subsequent_indent="  ")
    if chosen:
        return "\n".join([*lines, *_groups(known, chosen)])
    everything = HELP_ALL in words
    common = [flag for flag in known if _is_common(flag, page)]
    lines.append("")
    for flag in common:
        lines += _flag(flag)
    if everything:
        return "\n".join([*lines, *_groups([flag for flag in known if flag not in common], ["", *groups])])
    rare = [flag for flag in known if flag not in common]
    if rare:
        lines += ["", f"more flags, in full with {HELP_ALL}, or `{HELP[1]} GROUP`:"]
        for group in dict.fromkeys(flag.group for flag in rare):
            names = ", ".join(flag.name.removeprefix(f"--{group}.") for flag in rare if flag.group == group)
            lines.append(textwrap.shorten(f"  {group or 'others'}: {names}", COLUMNS - 2, placeholder=" ..."))
    return "\n".join(lines)


def _command(line: str) -> list[str]:
    """A command over as many lines as it takes, which a shell would read as one; none ends within quotes."""
    whole = re.sub(r"'[^']*'", lambda quoted: quoted[0].replace(" ", "\0"), line)
    wrapped = textwrap.wrap(whole, COLUMNS - 2, subsequent_indent=" " * 8, break_long_words=False,
                            break_on_hyphens=False)  # fmt: skip
    wrapped = [one.replace("\0", " ") for one in wrapped]
    return [*(f"{one} \\" for one in wrapped[:-1]), wrapped[-1]]


def _call(page: Page, known: Sequence[Flag]) -> str:
    words = [_positional(flag) for flag in known if flag.arg.positional]
    words += [f"{flag.name} {_metavar(flag.kind)}" for flag in known if _required(flag) and not flag.arg.positional]
    return " ".join([page.prog, *words, "[--flag value ...]"])


def _positional(flag: Flag) -> str:
    name = f"{flag.name} ..." if get_origin(flag.kind) is tuple else flag.name
    return name if _required(flag) else f"[{name}]"


def _required(flag: Flag) -> bool:
    return flag.default is dataclasses.MISSING


def _is_common(flag: Flag, page: Page) -> bool:
    if page.common:
        return flag.name in page.common or flag.arg.positional
    return not flag.group


def _groups(known: Sequence[Flag], groups: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for group in groups:
        own = [flag for flag in known if flag.group == group]
        if own:
            lines += ["", f"{group or 'others'}:"]
            for flag in own:
                lines += _flag(flag)
    return lines


def _flag(flag: Flag) -> list[str]:
    name = _positional(flag) if flag.arg.positional else f"{flag.name} {_metavar(flag.kind)}".rstrip()
    about = documentation(flag.owner).get(flag.path[-1], "")
    if not _required(flag) and not flag.arg.positional:
        about = f"{about} [{_shown(flag.default)}]"
    return _entry(name, about)


def _entry(name: str, about: str) -> list[str]:
    """A flag and what it is, wrapped; below each other where the flag is long."""
    wrapped = textwrap.wrap(about, COLUMNS - LEFT) or [""]
    if len(name) + 4 > LEFT:
        return [
            *textwrap.wrap(name, COLUMNS, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False),
            *(" " * LEFT + line for line in wrapped),
        ]
    return [f"{'  ' + name:<{LEFT}}{wrapped[0]}", *(" " * LEFT + line for line in wrapped[1:])]


def _metavar(kind: Any) -> str:
    kind = bare(kind)
    if get_origin(kind) is Literal:
        return "|".join(str(choice) or '""' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return f"{_metavar(inner[0])} ..." if inner[-1] is Ellipsis else " ".join(map(_metavar, inner))
    return {int: "INT", float: "NUMBER", Path: "PATH", bool: ""}.get(kind, "TEXT")


def _shown(value: Any) -> str:
    """A default as it would be written on the command line."""
    if value is True or value is False:
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    return "none" if value in ("", None) else str(value)


@functools.cache
def documentation(kind: type) -> dict[str, str]:
    """The literal under each field of a settings class, its bases' too, in one line each."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        parsed = ast.parse(source).body[0]
        body = parsed.body if isinstance(parsed, ast.ClassDef) else []
        for field, after in zip(body, body[1:], strict=False):
            if (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                    and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):  # fmt: skip
                texts[field.target.id] = " ".join(str(after.value.value).split())
    return texts
