"""Who is at work in a place: a mark that says what is being made there, of what, and by which process.

Of two jobs that begin at once one is the first. Another of the same identity joins it; one of another identity is refused until the
first has ended, been given up, or been deleted by a person.
"""

import json

from freeguide.configs.errors import DataError
from freeguide.configs.untrusted import MALFORMED, parse_json
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.data_pipeline.store.unfinished import ended, writer

BEGUN = "parts/begun"  # the mark
MARK_BYTES = 2**16  # at most


def claim(store: Store, work: str, identity: str) -> bool:
    """Marks a place as being written by `work` (prepare, ...) of that identity; whether it was not marked so before.

    Of two that begin at once one is the first; a second of the same identity joins it. Raises DataError if the first is of
    another identity and has not provably ended.
    """
    mine = json.dumps({"work": work, "identity": identity, "writer": writer()}).encode()
    there = store.create(BEGUN, mine)
    if there == mine:
        return True
    try:
        found = parse_json(there)
        first, same, over = str(found["work"]), found["identity"] == identity, found.get("over") is True or ended(found["writer"])
    except MALFORMED:
        first, same, over = "job", False, False
    if same:
        return False
    if over:
        store.put(BEGUN, mine)
        if store.get(BEGUN, MARK_BYTES) == mine:
            return True
    raise DataError(
        f"Another {first} writes to {store.home}, or was broken off there; let it end (its own command goes on where it stopped), "
        f"or delete {store.home}/parts and start again."
    )


def release(store: Store, identity: str) -> None:
    """Takes away the mark of `claim`, if it is of that identity."""
    if marked(store, identity):
        store.delete(BEGUN)


def leave(store: Store, work: str, identity: str) -> None:
    """Says that the work of `claim` was given up: who began it can go on, and others need not wait for its process to end."""
    if marked(store, identity):
        store.put(BEGUN, json.dumps({"work": work, "identity": identity, "writer": writer(), "over": True}).encode())


def begun_by(store: Store) -> str:
    """The work whose mark stands here, at work or broken off; "" = none."""
    try:
        return str(parse_json(store.get(BEGUN, MARK_BYTES))["work"])
    except (MissingObject, *MALFORMED):
        return ""


def marked(store: Store, identity: str) -> bool:
    try:
        return bool(parse_json(store.get(BEGUN, MARK_BYTES))["identity"] == identity)
    except (MissingObject, *MALFORMED):
        return False
