"""The weights that are sampled: an average of one step of a run, kept beside it.

A training that goes on deletes its older checkpoints, while an evaluation may last for days and be given again after weeks. So
whoever samples keeps the averaged weights first (`weights/step-00000500-ema-<name>.safetensors`, fp32). The name follows from the
checksums of all that they are made of: the checkpoint's manifest and, if an average is reconstructed, those of its snapshots.

They are as large as a network, so a job that ends well deletes those that nobody needs. What they were made of stays on record in a
small file beside them.
"""

import re
import sys
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from freeguide.configs.errors import CheckpointError, ConfigError, DataError
from freeguide.configs.schema import Config
from freeguide.configs.stored import from_yaml
from freeguide.configs.untrusted import JSON_BYTES, parse_json
from freeguide.data_pipeline.artifact import check_seal, fingerprint, get_sealed, read_safetensors, sealed_json, to_safetensors
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.checkpoints.averages import combined, recipe
from freeguide.trainer.checkpoints.manifest import CHECKPOINTS
from freeguide.trainer.checkpoints.profiles import sigma_rel_of
from freeguide.trainer.checkpoints.search import find
from freeguide.trainer.diffusion.guidances import guidance_of

_AGAIN = "delete it and sample a checkpoint that is still there"
KEY = re.compile(r"weights/step-(\d{8,})-[\w.]+-[0-9a-f]{12}\.safetensors")
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
    distance: float = 0.0  # of a reconstructed average to the profile that its name says, see `trainer.checkpoints.averages.Recipe`
    others: tuple["Weights", ...] = ()  # those of the other networks that the guidance asks, in their order

    @property
    def key(self) -> str:
        """Where they stand in the run once they are kept."""
        return f"{_prefix(self.step, self.ema)}{fingerprint({'ema': self.ema, 'of': self.of})}.safetensors"

    @property
    def all_of(self) -> tuple[str, ...]:
        """The checksums of everything that they and the others are made of: with the options, they decide an image."""
        return (*self.of, *(each for other in self.others for each in other.all_of))

    def keep(self) -> None:
        """Keep them and the others, unless that has been done. Raises CheckpointError if a checkpoint has been replaced since."""
        for other in self.others:
            other.keep()
        run, facts = open_store(self.run), {"of": self.of, "data": self.data, "distance": self.distance}
        if not run.exists(self.key):
            run.put(self.key, to_safetensors(self._average(run), _FACTS, facts))
        run.create(_facts_of(self.key), sealed_json(facts))

    def read(self) -> dict[str, Tensor]:
        """Their own values by parameter name, fp32: the kept ones, or else from the checkpoint. Raises CheckpointError as `keep`.

        Kept weights that are damaged, or have no checksum (older versions wrote none), are made again if the checkpoint is there.
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
        made = recipe(run, find(run, self.step), self.ema, self.lost)
        if made.of != self.of:
            raise CheckpointError(f"{self.run}: the checkpoint of step {self.step} has been replaced meanwhile; start again")
        return combined(run, made)


def weights_of(config: Config) -> Weights:
    """The weights `sampling.ema` of `sampling.checkpoint`: of a checkpoint, or kept from one that the training has deleted since.

    With them come those of the other networks that the guidance asks. Raises CheckpointError if there are none, and ConfigError if
    another network predicts something else or for other data.
    """
    others = tuple(_other_weights(config.run, other) for other in guidance_of(config).others(config))
    return replace(_own_weights(config), others=others)


def _other_weights(run: str, other: Config) -> Weights:
    stored = stored_config(run), stored_config(other.run)
    for group, name in (("diffusion", "prediction"), ("data", "image_size"), ("data", "channels"), ("data", "classes")):
        ours, theirs = (getattr(getattr(each, group), name) for each in stored)
        if ours != theirs:
            raise ConfigError(
                f"{other.run} was trained with {group}.{name}={theirs}, so it cannot guide {run}, which has {ours}; "
                "name a run that agrees"
            )
    return _own_weights(other)


def _own_weights(config: Config) -> Weights:
    run, step, name = open_store(config.run), config.sampling.checkpoint, config.sampling.ema
    try:
        found = find(run, step)
    except CheckpointError:
        there = {info.key for info in run.list("weights/") if step and info.key.startswith(_prefix(step, name))}
        stems = sorted({key.rpartition(".")[0] for key in there})
        if len(stems) != 1:
            raise
        facts = _read_facts(run, f"{stems[0]}.safetensors", there)
        of, distance = tuple(map(str, facts.get("of", ()))), facts.get("distance", 0.0)
        distance = float(distance) if isinstance(distance, int | float) else 0.0
        return Weights(config.run, step, name, of, str(facts.get("data", "")), distance=distance)
    if name not in (*found.averages, "master") and not sigma_rel_of(name):
        raise CheckpointError(
            f"{config.run}: the checkpoint of step {found.step} holds no average {name}; set sampling.ema to one of "
            f"{', '.join([*found.averages, 'master'])}"
        )
    data = found.identity.get("data.fingerprint", "")
    made = recipe(run, found, name, config.sampling.lost_snapshots)
    return Weights(config.run, found.step, name, made.of, data, config.sampling.lost_snapshots, made.distance)


def stored_config(uri: str) -> Config:
    """The config that the run at `uri` was trained with, read as data: nothing in it is resolved or checked.

    Raises CheckpointError if there is none, and ConfigError for a damaged one.
    """
    run = open_store(uri)
    try:
        return from_yaml(run.get("config.yaml", JSON_BYTES).decode(errors="replace"))
    except MissingObject:
        if not any(run.list(f"{kind}/") for kind in (CHECKPOINTS, "weights")):
            raise CheckpointError(f"{uri}: no run stands here; name the URI that a config calls `run`") from None
        raise CheckpointError(f"{uri}: its config.yaml is gone; give `freeguide train` again, which writes it") from None
    except ConfigError as error:
        raise ConfigError(f"{uri}/config.yaml: {error}") from None


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


def kept(run: Store) -> dict[str, int]:
    """The keys of the weights that are kept in a run, each with its step."""
    return {info.key: int(found[1]) for info in run.list("weights/") if (found := KEY.fullmatch(info.key))}


def _prefix(step: int, average: str) -> str:
    return f"weights/step-{step:08d}-{average}-"
