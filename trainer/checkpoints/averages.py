"""The weights that are sampled: an average that a checkpoint holds, or one that is made of the snapshots up to its step."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freeguide.configs.errors import CheckpointError
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.trainer.checkpoints.manifest import RESTORE, SNAPSHOTS, Checkpoint, manifest_of, read_manifest
from freeguide.trainer.checkpoints.profiles import reconstruction, sigma_rel_of
from freeguide.trainer.checkpoints.search import listing
from freeguide.trainer.checkpoints.values import load, read_pieces

_log = logging.getLogger("freeguide.checkpoint")


@dataclass(frozen=True)
class Recipe:
    """How the weights `name` of a checkpoint are made: the sum of coefficient times values over (snapshot or itself, kind)."""

    checkpoint: Checkpoint
    name: str
    parts: tuple[tuple[Checkpoint, str, float], ...]
    distance: float = 0.0  # of the profile that they make to the one that `name` says, relative; 0 for what is stored

    @property
    def of(self) -> tuple[str, ...]:
        """Checksums of all that they are made of."""
        return (self.checkpoint.sha256, *dict.fromkeys(part.sha256 for part, *_ in self.parts if part is not self.checkpoint))


def recipe(store: Store, checkpoint: Checkpoint, name: str, lost: bool = False) -> Recipe:
    """How to make the weights that `sampling.ema` names: a stored average, "master", or a sigma_rel_X from all snapshots.

    Raises CheckpointError if the run does not keep the average and it cannot be reconstructed, or if snapshots are lost. With
    `lost` (`sampling.lost_snapshots`) the snapshots that are left are read and checked, and the average is made of the good ones.
    """
    width = sigma_rel_of(name)
    if name in (*checkpoint.averages, "master") and not (lost and width and _damage(store, checkpoint, [name])):
        return Recipe(checkpoint, name, ((checkpoint, name, 1.0),))
    wanted = _snapshot_steps(store, checkpoint) if width else []
    if not wanted:
        why = f"has lost its average {name} ({checkpoint.lost[name]})" if name in checkpoint.lost else f"holds no average {name}"
        raise CheckpointError(
            f"{store.uri}/{checkpoint.key}: {why}; set sampling.ema to one of {', '.join([*checkpoint.averages, 'master'])}"
        )
    good, broken = _snapshots(store, checkpoint, wanted, every_byte=lost)
    if broken and not (lost and good):
        raise _shortage(store, checkpoint, name, good, broken)
    stored = [(snapshot, kind) for snapshot in good for kind in snapshot.averages]
    times = [(snapshot.step, sigma_rel_of(kind)) for snapshot, kind in stored]
    coefficients, distance = reconstruction(times, checkpoint.step, width)
    _log.info("%s from %d snapshots, its profile met to %.1e", name, len(stored), distance)
    if broken:
        _log.warning("%s is made without the lost snapshots of steps %s, its profile met to %.1e", name, _numbers(broken), distance)
    parts = [(*one, x) for one, x in zip(stored, coefficients.tolist(), strict=True)]
    return Recipe(checkpoint, name, tuple(parts), distance)


def average(store: Store, checkpoint: Checkpoint, name: str, lost: bool = False) -> dict[str, Tensor]:
    """The weights that `recipe` says how to make. Raises as `recipe` and `combined` do."""
    return combined(store, recipe(store, checkpoint, name, lost))


def combined(store: Store, made: Recipe) -> dict[str, Tensor]:
    """The weights of a recipe by parameter name, fp32 on the CPU. Raises CheckpointError for damaged values."""
    try:
        if len(made.parts) == 1 and made.parts[0][0] is made.checkpoint:
            return load(store, made.checkpoint, made.name)
        sums = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in made.checkpoint.shapes.items()}
        for snapshot, kind, x in made.parts:
            for key, values in load(store, snapshot, kind).items():
                sums[key].add_(values, alpha=x)  # in float64: coefficients of both signs cancel
    except CheckpointError:
        if not sigma_rel_of(made.name):
            raise
        good, broken = _snapshots(store, made.checkpoint, _snapshot_steps(store, made.checkpoint), every_byte=True)
        if not broken:
            raise
        raise _shortage(store, made.checkpoint, made.name, good, broken) from None
    return {key: values.float() for key, values in sums.items()}


def _snapshot_steps(store: Store, checkpoint: Checkpoint) -> list[int]:
    """Of the snapshots that there have to be, newest first: of its own step, and of those that the run has saved before."""
    steps = checkpoint.snapshots
    if steps is None:
        steps = tuple(step for step, key in listing(store, SNAPSHOTS) if key == manifest_of(step, SNAPSHOTS))
    own = {checkpoint.step} if steps or any(sigma_rel_of(name) for name in checkpoint.kept) else set()
    return sorted({step for step in steps if step <= checkpoint.step} | own, reverse=True)


def _snapshots(
    store: Store, checkpoint: Checkpoint, steps: Sequence[int], every_byte: bool
) -> tuple[list[Checkpoint], dict[int, str]]:
    """The whole snapshots of `steps`, and what is wrong with the others."""
    good: list[Checkpoint] = []
    broken: dict[int, str] = {}
    for step in steps:
        key = manifest_of(step, SNAPSHOTS)
        try:
            found = read_manifest(store, key)
        except MissingObject:
            broken[step] = f"{store.uri}/{key} does not exist"
            continue
        except CheckpointError as error:
            broken[step] = str(error).removesuffix(f"; {RESTORE}")
            continue
        both = found.identity.keys() & checkpoint.identity.keys()
        if (found.step, found.shapes) != (step, checkpoint.shapes) or any(
            found.identity[k] != checkpoint.identity[k] for k in both
        ):
            broken[step] = f"{store.uri}/{key} is of another step or another run"
        elif damage := every_byte and _damage(store, found, found.averages):
            broken[step] = damage
        else:
            good.append(found)
    return good, broken


def _damage(store: Store, checkpoint: Checkpoint, kinds: Sequence[str]) -> str:
    """What is wrong with the values of these kinds, "" for nothing."""
    try:
        for _ in read_pieces(store, [piece for piece in checkpoint.pieces if piece.kind in kinds]):
            pass
    except (CheckpointError, MissingObject) as error:
        return str(error).removesuffix(f"; {RESTORE}")
    return ""


def _shortage(store: Store, checkpoint: Checkpoint, name: str, good: list[Checkpoint], broken: dict[int, str]) -> CheckpointError:
    """Which snapshots are lost, and how far what can be made without them is from the profile wanted."""
    widths = {sigma_rel_of(kind) for c in (checkpoint, *good) for kind in c.kept} - {0.0}
    times = [(snapshot.step, sigma_rel_of(kind)) for snapshot in good for kind in snapshot.averages]
    every = [(step, width) for step in (*broken, *(snapshot.step for snapshot in good)) for width in sorted(widths)]
    far, near = (reconstruction(t, checkpoint.step, sigma_rel_of(name))[1] if t else None for t in (times, every))
    rest = "nothing is left to make it of" if far is None else f"made of the rest, its profile would be {far:.1e} of itself away"
    also = "" if near is None or far is None else f" instead of {near:.1e}"
    choice = "" if far is None else ", or set sampling.lost_snapshots=true to go on with the rest"
    return CheckpointError(
        f"{store.uri}: {name} of step {checkpoint.step} needs {len(good) + len(broken)} snapshots, and those of steps "
        f"{_numbers(broken)} are lost ({next(iter(broken.values()))}); {rest}{also}: restore them from a copy{choice}"
    )


def _numbers(steps: Iterable[int]) -> str:
    texts = [str(step) for step in sorted(steps)]
    return ", ".join(texts if len(texts) < 8 else [*texts[:6], f"... ({len(texts)} in all)"])
