"""The weights that are sampled: an average of one step of a run, kept beside it.

A training that goes on deletes its older checkpoints, while an evaluation may last for days and be given again after weeks. So
whoever samples keeps the averaged weights first (`weights/step-00000500-ema-<name>.safetensors`, fp32). The name follows from the
checksums of all that they are made of: the checkpoint's manifest and, where an average is reconstructed, those of its snapshots.

They are as large as a network, so each job that ends well deletes those of old steps (`sweep`), but not what they were. Units and
generated sets that are not finished say which weights make them (`needed_by`), and keep them.
"""

import contextlib
import re
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from freeguide.cluster.evaluation import units
from freeguide.configs.errors import CheckpointError, DataError, UserError
from freeguide.configs.schema import Config
from freeguide.configs.untrusted import parse_json
from freeguide.data_pipeline import manifest
from freeguide.data_pipeline.artifact import check_seal, get_sealed, read_safetensors, sealed_json, to_safetensors
from freeguide.data_pipeline.store.base import Store, open_store
from freeguide.trainer.training import checkpoint
from freeguide.trainer.training.ema import sigma_rel_of

_AGAIN = "delete it and sample a checkpoint that is still there"
NEEDED = "weights.txt"  # beside units: the key of the weights that make them
_KEY = re.compile(r"weights/step-(\d{8,})-[\w.]+-[0-9a-f]{12}\.safetensors")
_UNIT = re.compile(r"units/w([^/]+)/\d+-(\d+)\.npz")
_ROW = re.compile(r"rows/w(.+)-n(\d+)-[0-9a-f]+\.npz")
_FACTS = "freeguide"  # name of the one entry in the metadata of a kept file


@dataclass(frozen=True)
class Weights:
    """Which weights: those of `ema` at `step` of `run`, made of the objects with the checksums `of`."""

    run: str
    step: int
    ema: str
    of: tuple[str, ...]
    data: str  # fingerprint of the data that they were trained on
    lost: bool = False  # whether they may be made without the snapshots that are lost
    distance: float = 0.0  # of a reconstructed average to the profile that its name says, see `trainer.training.checkpoint.Recipe`

    @property
    def key(self) -> str:
        """Where they stand in the run once they are kept."""
        return f"{_prefix(self.step, self.ema)}{units.fingerprint({'ema': self.ema, 'of': self.of})}.safetensors"

    def keep(self) -> None:
        """Keep them, where that has not been done. Raises CheckpointError where the checkpoint is no longer the one that it was."""
        run, facts = open_store(self.run), {"of": self.of, "data": self.data, "distance": self.distance}
        if not run.exists(self.key):
            run.put(self.key, to_safetensors(self._average(run), _FACTS, facts))
        run.create(_facts_of(self.key), sealed_json(facts))

    def read(self) -> dict[str, Tensor]:
        """Their values by parameter name, fp32: the kept ones, or else from the checkpoint. Raises CheckpointError as `keep`.

        What was kept and is damaged, or has no checksum as older versions kept it, is made again where the checkpoint still stands.
        """
        run = open_store(self.run)
        if not run.exists(self.key):
            return self._average(run)
        where, data = f"{run.uri}/{self.key}", run.get(self.key)
        kept, doubt = None, f"{where} was kept without a checksum"
        try:
            kept, _ = read_safetensors(data, where, _FACTS, "a kept average", _AGAIN)
            if check_seal(data, where):
                return kept
        except DataError as error:
            doubt = str(error)
        try:
            made = self._average(run)
        except CheckpointError:
            if kept is None:
                raise CheckpointError(doubt) from None
            print(f"WARNING: {doubt} and its checkpoint is gone: its values are read as they are", file=sys.stderr, flush=True)
            return kept
        print(f"WARNING: {doubt.partition(';')[0]}: its values are made again from the checkpoint", file=sys.stderr, flush=True)
        return made

    def _average(self, run: Store) -> dict[str, Tensor]:
        found = checkpoint.find(run, self.step)
        if checkpoint.recipe(run, found, self.ema, self.lost).of != self.of:
            raise CheckpointError(f"{self.run}: the checkpoint of step {self.step} has been replaced meanwhile; start again")
        return checkpoint.average(run, found, self.ema, self.lost)


def weights_of(config: Config) -> Weights:
    """The weights `sampling.ema` of `sampling.checkpoint`: of a checkpoint, or kept from one that the training has deleted since.

    Raises CheckpointError where there are none.
    """
    run, step, average = open_store(config.run), config.sampling.checkpoint, config.sampling.ema
    try:
        found = checkpoint.find(run, step)
    except CheckpointError:
        there = {info.key for info in run.list("weights/") if step and info.key.startswith(_prefix(step, average))}
        kept = sorted({key.rpartition(".")[0] for key in there})
        if len(kept) != 1:
            raise
        facts = _read_facts(run, f"{kept[0]}.safetensors", there)
        of, distance = tuple(map(str, facts.get("of", ()))), facts.get("distance", 0.0)
        distance = float(distance) if isinstance(distance, int | float) else 0.0
        return Weights(config.run, step, average, of, str(facts.get("data", "")), distance=distance)
    if average not in (*found.averages, "master") and not sigma_rel_of(average):
        raise CheckpointError(
            f"{config.run}: the checkpoint of step {found.step} holds no average {average}; set sampling.ema to one of "
            f"{', '.join([*found.averages, 'master'])}"
        )
    data = found.identity.get("data.fingerprint", "")
    made = checkpoint.recipe(run, found, average, config.sampling.lost_snapshots)
    return Weights(config.run, found.step, average, made.of, data, config.sampling.lost_snapshots, made.distance)


def _facts_of(key: str) -> str:
    """Where it stands what weights are, also when they have gone: so what was made of them is found again."""
    return f"{key.rpartition('.')[0]}.json"


def _read_facts(run: Store, key: str, there: set[str]) -> dict[str, Any]:
    if _facts_of(key) not in there:  # earlier versions wrote none
        return read_safetensors(run.get(key), f"{run.uri}/{key}", _FACTS, "a kept average", _AGAIN)[1]
    try:
        return dict(parse_json(get_sealed(run, _facts_of(key), most=2**20)))
    except (ValueError, TypeError) as error:
        raise DataError(f"{run.uri}/{_facts_of(key)} does not say what the weights are ({error}); {_AGAIN}") from None


def needed_by(place: Store, weights: Weights) -> None:
    """Keep the weights, and have the units at `place`, of a run, say that they are made of these."""
    place.create(NEEDED, weights.key.encode())
    weights.keep()


def sweep(run: Store, steps: int) -> list[str]:
    """Delete kept weights of all but the newest `steps` steps that were sampled, and that nothing unfinished needs; their keys.

    A job elsewhere that has not begun yet to make its units has its weights in memory, or makes them again from the checkpoint, or
    says that they are gone. Never raises: what cannot be looked at or deleted stays.
    """
    gone: list[str] = []
    with contextlib.suppress(UserError):
        kept = {info.key: int(found[1]) for info in run.list("weights/") if (found := _KEY.fullmatch(info.key))}
        newest = sorted(set(kept.values()))[-steps:]
        if old := [key for key, step in kept.items() if step not in newest]:
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
            finished = manifest.NAME in names
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
            if not _KEY.fullmatch(key):
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


def _prefix(step: int, average: str) -> str:
    return f"weights/step-{step:08d}-{average}-"
