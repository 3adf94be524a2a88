"""Whose folder is it? A data set claims its output before it writes shards, so that another one is refused there.

A claim is an object named after its content: two runs of the same request write the same one, and no conditional put
is needed, which some stores ignore. Whoever finds another claim beside his own takes his own back. Two that come at
the very same moment may both do so; then nothing was written, and one of them is started again.
"""

import hashlib
import logging
from collections.abc import Iterator

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import DataError, NotFoundError
from datapipe.dataset.manifest import has_manifest
from datapipe.storage import Store, probe

FOLDER = "requests"
RULES_SETTING, FIRST_RULES = "screening_rules", 1
"""Among the settings of a request: the version of the rules by which crops are read and screened; before there was one,
they were the first."""
log = logging.getLogger(__name__)


def owns_output(store: Store, request: bytes) -> bool:
    """Whether the folder is this request's already; False: nobody's. DataError where it is another one's."""
    own = _name(request)
    claims = list(_claims(store))
    for name in claims:
        if name != own:
            raise _refusal(store, name, request)
    if not claims and has_manifest(store):
        raise DataError("another data set is already there", where=store.url, hint="choose another --out")
    return bool(claims)


def is_written(store: Store, request: bytes, out: str) -> bool:
    """Whether this request's data set is there whole. Raises StorageError where a folder that is nobody's yet, at the
    address `out`, cannot hold one, DataError where it is another request's, or the same one's of other rules that is
    not finished."""
    if has_manifest(store) and (rules := _rules_of_same(store, request)):
        log.warning("%s: finished under version %s of the screening rules, this is version %s; another --out ingests "
                    "the sources anew", out, *rules)  # fmt: skip
        return True
    if not owns_output(store, request):
        probe(store).demand("ranges", "lists", where=out)
        return False
    return has_manifest(store)


def claim_output(store: Store, request: bytes) -> None:
    """Make the folder this request's, for all runs of it. DataError where it is another one's."""
    if owns_output(store, request):
        return
    own = _name(request)
    made = store.create(own, request)
    others = [name for name in _claims(store) if name != own]
    if others:
        if made:  # not by another run of the same request, which may rely on it
            store.delete(own)
        raise _refusal(store, others[0], request)


def _name(request: bytes) -> str:
    return f"{FOLDER}/{hashlib.sha256(request).hexdigest()[:16]}.json"


def _claims(store: Store) -> Iterator[str]:
    try:
        yield from (entry.name for entry in store.list(f"{FOLDER}/"))
    except NotFoundError:  # the folder itself is still to be made
        return


def _rules_of_same(store: Store, request: bytes) -> tuple[int, int] | None:
    """(there, here) where the folder's one claim is the same request of other screening rules."""
    claims = list(_claims(store))
    if len(claims) != 1 or claims[0] == _name(request):
        return None
    try:
        other, here = parse_record(store.read(claims[0])), parse_record(request)
        rules = (other["settings"].pop(RULES_SETTING, FIRST_RULES), here["settings"].pop(RULES_SETTING, FIRST_RULES))
    except (NotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rules if other == here else None


def _refusal(store: Store, name: str, request: bytes) -> DataError:
    try:
        other, here = parse_record(store.read(name)), parse_record(request)
        differences = list(_differences(other, here))
    except (NotFoundError, ValueError, KeyError, TypeError, AttributeError):  # just taken back, or of another version
        differences = ["it cannot be read"]
    return DataError(
        "--out belongs to another data set: " + "; ".join(differences),
        where=store.address(name),
        hint="choose another --out, or delete that folder",
    )


def _differences(existing: dict, here: dict) -> Iterator[str]:
    for name, value in here["settings"].items():
        other = existing["settings"].get(name, FIRST_RULES if name == RULES_SETTING else None)
        if other != value:
            yield f"{name} is {other} there and {value} here"
    changed = sorted({name for name, _ in set(existing["sources"].items()) ^ set(here["sources"].items())})
    if changed:
        yield "other sources, or other files in them: " + ", ".join(changed)
    if existing["licence"] != here["licence"]:
        yield "another licence"
