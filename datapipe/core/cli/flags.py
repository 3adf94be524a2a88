"""Settings classes as flags of a command line: read from the words, checked, and every mistake told in one way.

A field `lr` of a nested field `optimisation` is `--optimisation.lr`; underscores may be hyphens. The last of two equal
flags counts, unless the flag is there to be given repeatedly.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from datapipe.core.errors import UsageError

T = TypeVar("T")
Words = list[str]
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


class Arg(NamedTuple):
    """How a field stands on the command line, as metadata of its `Annotated` type."""

    name: str = ""
    """In place of the field's own."""
    aliases: tuple[str, ...] = ()
    """Whole flags, with their hyphens."""
    positional: bool = False
    """A word without a flag."""
    inline: bool = False
    """The fields of this nested class are flags without a prefix."""
    repeated: bool = False
    """A flag of one word that may be given repeatedly; its field is a tuple of all of them."""


POSITIONAL, INLINE, REPEATED = Arg(positional=True), Arg(inline=True), Arg(repeated=True)


@dataclasses.dataclass(frozen=True)
class Flag:
    """A field that holds a value."""

    path: tuple[str, ...]
    """Names of the fields from the root to it."""
    name: str
    """As it is written: "--optimisation.lr"; RUN for a positional word."""
    kind: Any
    """Type of the value, without metadata."""
    default: Any
    """dataclasses.MISSING: it must be given."""
    owner: type
    """The class that the field is of."""
    arg: Arg

    @property
    def group(self) -> str:
        """The prefix of its name: "optimisation"; empty at the root."""
        return self.name.removeprefix("--").rpartition(".")[0]


def flags_of(kind: type, default: Any = None) -> list[Flag]:
    """Every flag of a settings class. `default`: an instance whose values are the defaults, and whose nested values
    say which class of a union is meant."""
    return list(_flags(kind, default, (), ""))


def _flags(kind: type, default: Any, path: tuple[str, ...], prefix: str) -> Iterator[Flag]:
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        bare, arg = _apart(hints[field.name])
        value = _default(field) if default is None else getattr(default, field.name)
        name = arg.name or field.name
        here = (*path, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _flags(type(value), value, here, prefix if arg.inline else f"{prefix}{name}.")
        elif arg.positional:
            yield Flag(here, name.upper(), bare, value, kind, arg)
        else:
            yield Flag(here, f"--{prefix}{name}".replace("_", "-"), bare, value, kind, arg)


def _apart(hint: Any) -> tuple[Any, Arg]:
    """(type without metadata, how it stands on the command line)."""
    if get_origin(hint) is not Annotated:
        return hint, Arg()
    bare, *metadata = get_args(hint)
    return bare, next((one for one in metadata if isinstance(one, Arg)), Arg())


def _default(field: Any) -> Any:
    """The field's default; of pydantic's `Field(default=...)`, too."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    value = field.default
    if type(value).__name__ == "FieldInfo":
        return dataclasses.MISSING if value.is_required() else value.get_default(call_default_factory=True)
    return value


# ------------------------------------------------------------------------------------------------- words -> settings


class Parsed(NamedTuple):
    """What a command line says."""

    values: dict[tuple[str, ...], Any]
    """By path; what is not given is absent."""
    rest: Words
    """Flags that are not of this class, with their words, where they are allowed."""


def read(kind: type[T], words: Sequence[str], *, prog: str, default: T | None = None, also: Sequence[Flag] = ()) -> T:
    """The settings that a command line means. `also`: other flags that an unknown one may mean. Raises UsageError with
    every mistake in it."""
    made, rest = read_some(kind, words, prog=prog, default=default)
    if rest:
        raise unknown(rest, [*flags_of(kind, default), *also], prog)
    return made


def read_some(kind: type[T], words: Sequence[str], *, prog: str, default: T | None = None) -> tuple[T, Words]:
    """The settings, and the flags with their words that belong to another class, in their order."""
    known = flags_of(kind, default)
    parsed = _lex(known, words, prog)
    absent = [flag for flag in known if flag.default is dataclasses.MISSING and flag.path not in parsed.values]
    wrong = [_absent(flag) for flag in absent]
    if wrong:
        raise mistakes([*_unknown(parsed.rest, known), *wrong], prog)
    return _built(kind, default, parsed.values, known, prog), parsed.rest


def _lex(known: Sequence[Flag], words: Sequence[str], prog: str) -> Parsed:
    by_name = {name: flag for flag in known if not flag.arg.positional for name in (flag.name, *flag.arg.aliases)}
    off = {f"--no-{name[2:]}": flag for name, flag in by_name.items() if switches(flag.kind)}
    values: dict[tuple[str, ...], Any] = {}
    loose: Words = []
    rest: Words = []
    wrong: list[str] = []
    line = list(words)
    while line:
        word = line.pop(0)
        if word == "--":
            loose += line
            break
        if not word.startswith("--"):
            loose.append(word)
            continue
        given, equals, value = word.partition("=")
        name = given.replace("_", "-")
        if name in off and not equals:
            values[off[name].path] = False
        elif flag := by_name.get(name):
            try:
                own = _taken(str if flag.arg.repeated else flag.kind, [value] if equals else line, bool(equals))
                before = values.get(flag.path, ()) if flag.arg.repeated else ()
                values[flag.path] = (*before, *convert(flag.kind, own)) if before else convert(flag.kind, own)
            except Unfit as error:
                wrong.append(f"`{given}`: {error}")
        else:
            rest.append(word)
            while line and not line[0].startswith("--"):
                rest.append(line.pop(0))
    _place(known, loose, values, wrong)
    if wrong:
        raise mistakes(wrong, prog)
    return Parsed(values, rest)


def _place(known: Sequence[Flag], loose: Words, values: dict[tuple[str, ...], Any], wrong: list[str]) -> None:
    """Give the words without a flag to the positional fields."""
    for flag in (flag for flag in known if flag.arg.positional):
        if not loose:
            break
        own = [loose.pop(0) for _ in range(len(loose) if get_origin(flag.kind) is tuple else 1)]
        try:
            values[flag.path] = convert(flag.kind, own)
        except Unfit as error:
            wrong.append(f"{flag.name}: {error}")
    if loose:
        wrong.append(f"`{loose[0]}` is one word too many; a flag begins with two hyphens")


def _taken(kind: Any, line: Words, only: bool) -> Words:
    """The words of a value, taken from the front of the line. `only`: the line is that value alone."""
    if only:
        return list(line)
    if switches(kind):
        known = TRUE | FALSE | set(map(str, get_args(kind)))
        return [line.pop(0)] if line and (line[0] in known or line[0].lower() in known) else ["true"]
    least, most = _counts(kind)
    taken: Words = []
    while line and len(taken) < most and not (line[0].startswith("--") or line[0] in HELP):
        taken.append(line.pop(0))
        if taken == ["None"] and type(None) in _members(kind):
            return taken
    if len(taken) < least:
        given = f", not {' '.join(taken)}" if taken else " is missing"
        raise Unfit(f"{allowed(kind)}{given}")
    return taken


def _counts(kind: Any) -> tuple[int, float]:
    """(fewest, most) words that a value of this type is made of."""
    for member in _members(kind):
        if get_origin(member) is tuple:
            inner = get_args(member)
            return (0, math.inf) if inner[-1] is Ellipsis else (len(inner), len(inner))
    return 1, 1


class Unfit(ValueError):
    """Words are no value of a type; says what is allowed."""


TRUE, FALSE = {"true", "yes", "on"}, {"false", "no", "off"}


def switches(kind: Any) -> bool:
    """Does the flag alone say "true", and `--no-...` "false"? Those of bool do, and of choices that include both."""
    return kind is bool or (get_origin(kind) is Literal and any(choice is True for choice in get_args(kind)))


def convert(kind: Any, words: Words) -> Any:
    """The value that words stand for. Raises Unfit."""
    members = _members(kind)
    if type(None) in members:
        return None if words == ["None"] else convert(_other(members), words)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if inner[-1] is not Ellipsis:
            return tuple(_one(item, word) for item, word in zip(inner, words, strict=True))
        width = len(get_args(inner[0])) if get_origin(_apart(inner[0])[0]) is tuple else 1
        if len(words) % width:
            raise Unfit(f"{allowed(kind)}, not {' '.join(words)}")
        groups = [words[at : at + width] for at in range(0, len(words), width)]
        return tuple(convert(inner[0], group) if width > 1 else _one(inner[0], group[0]) for group in groups)
    return _one(kind, words[0])


def _one(kind: Any, word: str) -> Any:
    bare = _apart(kind)[0]
    if get_origin(bare) is Literal:
        choices = {str(choice): choice for choice in get_args(bare)}
        if word in choices:
            return choices[word]
        if switches(bare) and word.lower() in TRUE | FALSE:
            return word.lower() in TRUE
        near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
        raise Unfit(f"{allowed(bare)}, not {word}" + (f"; did you mean {near[0]}?" if near else ""))
    if bare is bool and word.lower() in TRUE | FALSE:
        return word.lower() in TRUE
    if bare in (int, float, str, Path):
        try:
            return bare(word)
        except ValueError:
            pass
    raise Unfit(f"{allowed(bare)}, not {word}")


_NAMED = {int: "an integer", float: "a number", str: "a word", Path: "a path", bool: "true or false"}


def allowed(kind: Any) -> str:
    """What may stand for a value of this type, in words."""
    bare = _apart(kind)[0]
    members = _members(bare)
    if type(None) in members:
        return f"{allowed(_other(members))}, or None"
    if get_origin(bare) is Literal:
        choices = [str(choice) or '""' for choice in get_args(bare)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(bare) is tuple:
        inner = get_args(bare)
        if inner[-1] is Ellipsis:
            return f"any number of: {allowed(inner[0])}"
        return f"{len(inner)} values ({', '.join(map(allowed, inner))})"
    return _NAMED.get(bare, str(bare))


def bare(kind: Any) -> Any:
    """The type without metadata and without None: what its values are when they are given."""
    members = _members(_apart(kind)[0])
    return _apart(_other(members))[0] if type(None) in members else members[0]


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _other(members: Sequence[Any]) -> Any:
    return next(member for member in members if member is not type(None))


# ------------------------------------------------------------------------------------------------------------- checks


def _built(kind: type[T], default: T | None, values: Mapping[tuple[str, ...], Any], known: Sequence[Flag],
           prog: str) -> T:  # fmt: skip
    """The settings with these values; each class checks its own, and all that is wrong is told."""
    from pydantic import ValidationError

    names = {flag.path: flag.name for flag in known}
    wrong: list[str] = []

    def build(kind: type, default: Any, path: tuple[str, ...]) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            here = (*path, field.name)
            value = _default(field) if default is None else getattr(default, field.name)
            if here in values:
                changes[field.name] = values[here]
            elif any(given[: len(here)] == here for given in values):
                changes[field.name] = build(type(value), value, here)
        try:
            return kind(**changes) if default is None else dataclasses.replace(default, **changes)
        except ValidationError as error:
            wrong.extend(_in_words(item, path, names) for item in error.errors())
            return default

    made: T = build(kind, default, ())
    if wrong:
        raise mistakes(list(dict.fromkeys(wrong)), prog)
    return made


def _in_words(item: Any, path: tuple[str, ...], names: Mapping[tuple[str, ...], str]) -> str:
    """A mistake that a settings class has found, with the flag that it is about."""
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    inner = [part for part in item["loc"] if isinstance(part, str)]
    name = next((names[here] for end in range(len(inner), 0, -1) if (here := (*path, *inner[:end])) in names), "")
    if not name:
        return message[:1].lower() + message[1:]
    return f"`{name}`: {message[:1].lower()}{message[1:]}, not {item['input']!r}"


def _absent(flag: Flag) -> str:
    return f"{flag.name} is missing" if flag.arg.positional else f"`{flag.name}` is missing: {allowed(flag.kind)}"


def unknown(words: Sequence[str], known: Sequence[Flag], prog: str) -> UsageError:
    """What is said of flags that nobody knows. `words`: they and their values."""
    return mistakes(_unknown(words, known), prog)


def _unknown(words: Sequence[str], known: Sequence[Flag]) -> list[str]:
    names = [flag.name for flag in known if not flag.arg.positional]
    mistakes = []
    for word in words:
        if word.startswith("--"):
            given = word.partition("=")[0]
            near = nearest(given, names)
            mistakes.append(f"no flag `{given}`" + (f"; did you mean `{near}`?" if near else ""))
    return mistakes


def nearest(name: str, names: Sequence[str]) -> str:
    """The most similar of these flags, by all of it or by what follows its last dot; empty: none is."""
    near = difflib.get_close_matches(name.replace("_", "-"), names, n=1, cutoff=0.7)
    if near:
        return near[0]
    lasts: dict[str, str] = {}
    for one in names:
        lasts.setdefault(_last(one), one)
    near = difflib.get_close_matches(_last(name), list(lasts), n=1, cutoff=0.7)
    return lasts[near[0]] if near else ""


def _last(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]


def mistakes(wrong: Sequence[str], prog: str) -> UsageError:
    """All that is wrong in a command line, as one error."""
    what = wrong[0] if len(wrong) == 1 else "\n".join([f"{len(wrong)} mistakes:", *(f"    {one}" for one in wrong)])
    return UsageError(what, where=prog, hint=f"`{prog} --help` says what there is, `--help-all` all of it")
