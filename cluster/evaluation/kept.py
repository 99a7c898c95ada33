"""Which kept weights of a run may go: those of old steps that nothing unfinished needs.

Weights are as large as a network, so each job that ends well deletes those of old steps (`delete_old`). Units and generated sets
that are not finished say which weights make them (`needed_by`), and keep them.
"""

import contextlib
import re

from freeguide.configs.errors import UserError
from freeguide.data_pipeline import stored
from freeguide.data_pipeline.store.base import Store
from freeguide.trainer.weights import KEY, Weights, kept

NEEDED = "weights.txt"  # beside units: the key of the weights that make them
_UNIT = re.compile(r"units/w([^/]+)/\d+-(\d+)\.npz")
_ROW = re.compile(r"rows/w(.+)-n(\d+)-[0-9a-f]+\.npz")


def needed_by(place: Store, weights: Weights) -> None:
    """Keep the weights, and have the units at `place`, of a run, say that they are made of these."""
    place.create(NEEDED, weights.key.encode())
    weights.keep()


def delete_old(run: Store, steps: int) -> list[str]:
    """Delete kept weights of all but the newest `steps` steps that were sampled, and that nothing unfinished needs; their keys.

    A job elsewhere that has not begun yet to make its units has its weights in memory, or makes them again from the checkpoint, or
    says that they are gone. Never raises: what cannot be looked at or deleted stays.
    """
    gone: list[str] = []
    with contextlib.suppress(UserError):
        steps_of = kept(run)
        newest = sorted(set(steps_of.values()))[-steps:]
        if old := [key for key, step in steps_of.items() if step not in newest]:
            needed = _needed(run)
            for key in old:
                if needed is not None and key not in needed:
                    run.delete(key)
                    gone.append(key)
    return gone


def _needed(run: Store) -> set[str] | None:
    """The weights of what has been begun in this run and is not finished; None where that does not say which."""
    needed = set[str]()
    for place, names in _places(run).items():
        if place.startswith("generate/"):
            finished = stored.NAME in names
        else:
            begun, rows = dict[str, int](), dict[str, int]()
            for name in names:
                if unit := _UNIT.fullmatch(name):
                    begun[unit[1]] = max(begun.get(unit[1], 0), int(unit[2]))
                elif row := _ROW.fullmatch(name):
                    rows[row[1]] = max(rows.get(row[1], 0), int(row[2]))
            finished = all(rows.get(w, 0) >= last for w, last in begun.items()) and bool(rows or NEEDED not in names)
        if not finished:
            key = run.get(f"{place}/{NEEDED}", 4096).decode(errors="replace") if NEEDED in names else ""
            if not KEY.fullmatch(key):
                return None
            needed.add(key)
    return needed


def _places(run: Store) -> dict[str, list[str]]:
    """What was sampled in this run: the places of units, with the names in them."""
    places: dict[str, list[str]] = {}
    for info in (*run.list("evaluate/"), *run.list("generate/")):
        kind, place, *rest = info.key.split("/", 2)
        if rest:
            places.setdefault(f"{kind}/{place}", []).append(rest[0])
    return places
