"""Which checkpoints a run has, which of them are whole, and which one is taken.

There is one resume mechanism: every start looks for the newest checkpoint that is whole. Averages may be lost and the weights and
moments be there: then a training goes on without them, if it is told to (`train.lost_averages`).
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from freeguide.configs.errors import CheckpointError
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.trainer.checkpoints.manifest import (
    CHECKPOINTS,
    MANIFEST,
    RESTORE,
    ROUNDS,
    SNAPSHOTS,
    Checkpoint,
    folder_of,
    manifest_of,
    parsed,
    present_files,
    stated_step,
)

KEPT = "a training keeps its newest checkpoints only: name one of those, or have train.keep_every keep more"
DATA, CONTENT = "data.fingerprint", "data.content"  # the second is the same without the names of the classes
_UNRECORDED = ["train.ema_decay"]  # what the identity in older manifests does not say
_LISTINGS = 10  # of a run that deletes what was listed before it can be read
_log = logging.getLogger("freeguide.checkpoint")

Shapes = Mapping[str, tuple[int, ...]]


def survey(store: Store, kind: str = CHECKPOINTS) -> Iterator[Checkpoint | CheckpointError]:
    """The checkpoints (or SNAPSHOTS) of a run, newest first: each as its manifest says, or what is wrong with it.

    A training that goes on deletes its older checkpoints: they are passed over. If all that were listed have gone, the training has
    saved newer ones before it deleted them, so they are listed again. Raises CheckpointError if the training is always faster.
    """
    seen: set[str] = set()
    for _ in range(_LISTINGS):
        found_one = gone = False
        listed = listing(store, kind)
        steps = {step for step, key in listed if key == manifest_of(step, kind)}
        turns = []
        for step, key in listed:
            if key not in seen:
                seen.add(key)
                with contextlib.suppress(MissingObject):
                    turns.append((step if step >= 0 else stated_step(store, key) or -1, key))
        for _, key in sorted(turns, reverse=True):
            try:
                found = parsed(store, key)
                if key == manifest_of(found.step, kind):
                    yield present_files(store, found)
                    found_one = True
                elif all(step < found.step for step in steps if key != manifest_of(step, kind)):  # else a copy of one of ours
                    place = folder_of(found.step, kind)
                    yield CheckpointError(f"{store.uri}/{key}: holds step {found.step}; rename its folder to {place}")
            except MissingObject:
                gone = True
            except CheckpointError as error:
                yield error
        if found_one or not gone:
            return
    raise CheckpointError(
        f"{store.uri}: its {kind} were deleted before they could be read, {_LISTINGS} times in a row; "
        f"have train.keep_checkpoints keep more"
    )


def newest(store: Store, kind: str = CHECKPOINTS) -> Iterator[Checkpoint]:
    """Those of `survey` that are whole."""
    for found in survey(store, kind):
        yield from _usable(found)


def _usable(found: Checkpoint | CheckpointError) -> Iterator[Checkpoint]:
    """`found`, or a warning that names what is wrong with it."""
    if isinstance(found, Checkpoint):
        yield found
    else:
        _log.warning("%s; trying the one before it", found)


def find(store: Store, step: int = 0) -> Checkpoint:
    """The whole checkpoint of `step`, or the newest for 0. Raises CheckpointError if there is none."""
    others, damaged = [], []
    for found in survey(store):
        if isinstance(found, CheckpointError):
            damaged.append(found)
        for each in _usable(found):
            if step in (0, each.step):
                return each
            others.append(str(each.step))
    if others:
        raise CheckpointError(f"{store.uri}: no whole checkpoint of step {step}, only of {', '.join(others[::-1])}; {KEPT}")
    if damaged:
        raise damaged[0]
    raise CheckpointError(f"{store.uri}: no checkpoint; run `freeguide train` first, or name the run as run=URI")


def candidates(
    store: Store, names: Sequence[str] = (), drop: bool = False, without: list[str] | None = None
) -> Iterator[Checkpoint]:
    """The checkpoints that a run with the averages `names` can go on from, newest first: those that have all, or any with `drop`.

    Raises CheckpointError if there are checkpoints and none of them will do. `without` says which of them would do with `drop`; a
    caller that finds more averages lost than the manifests tell adds them to it.
    """
    count, without = 0, [] if without is None else without
    for found in survey(store):
        count += 1
        for each in _usable(found):
            lost = {name: why for name, why in each.lost.items() if name in names}
            if lost and not drop:
                without.append(without_averages(each, lost))
                _log.warning("%s; trying the one before it", without[-1])
                continue
            yield each
    if count:
        choice = f"{without[0]}: {RESTORE}, or go on without by train.lost_averages=drop" if without else "restore one from a copy"
        raise CheckpointError(
            f"{store.uri}: none of its {count} checkpoints can be used as it is; {choice}, or begin anew at another run=URI"
        )


def without_averages(checkpoint: Checkpoint, lost: dict[str, str]) -> str:
    why = next(iter(lost.values())).removesuffix(f"; {RESTORE}")
    return f"the training state of step {checkpoint.step} is there, but its averages {', '.join(sorted(lost))} are not ({why})"


# --- whether a checkpoint is one of this run ---


def check_identity(store: Store, checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raises CheckpointError, naming the first difference, if the run was started with something else."""
    # Runs from before CONTENT was recorded may have begun on data without names, which is what CONTENT says of data with names.
    began = checkpoint.identity.get(CONTENT, checkpoint.identity.get(DATA))
    kept = {ROUNDS, CONTENT} | ({DATA} if began is not None and began == identity.get(CONTENT) else set())
    for name in sorted((identity.keys() | checkpoint.identity.keys()) - kept):
        then, now = checkpoint.identity.get(name), identity.get(name)
        if then != now and (name in checkpoint.identity or name not in _UNRECORDED):
            raise CheckpointError(
                f"{store.uri}: this run was started with {name}={then}, now it is {now}; put it back or name another run=URI"
            )


def check_shapes(run: str, saved: Shapes, shapes: Shapes) -> None:
    """Raises CheckpointError, naming the first parameter that differs, if the network is another one than that of the run."""
    for name in sorted(shapes.keys() | saved.keys()):
        then, now = saved.get(name), shapes.get(name)
        if then != now:
            raise CheckpointError(
                f"{run}: parameter {name} has shape {then} in the checkpoint and {now} in this network; name another run=URI"
            )


def check_averages(store: Store, checkpoint: Checkpoint, names: Sequence[str], drop: bool = False) -> None:
    """Raises CheckpointError for an average that the run has not kept so far: begun now, it would be another one.

    With `drop` the run goes on without it.
    """
    for name in names:
        if name not in checkpoint.kept and not drop:
            raise CheckpointError(
                f"{store.uri}: the average {name} was not kept up to step {checkpoint.step} and cannot begin there; "
                f"take it out of train.ema_half_lives or train.ema_sigma_rel, or name another run=URI"
            )


# --- what stands in a run ---


def describe(store: Store) -> dict[str, Any]:
    """Where a run stands, from its manifests alone: its checkpoints, what the newest whole one says, and what is damaged."""
    steps, damaged, last = [], [], None
    for found in survey(store):
        if isinstance(found, CheckpointError):
            damaged.append(str(found))
            continue
        last = last or found
        steps.append(found.step)
    state: dict[str, Any] = {"run": store.uri, "checkpoints": sorted(steps), "damaged": damaged}
    if last is not None:
        state |= {
            "step": last.step,
            "world_size": last.world_size,
            "zero_stage": last.zero_stage,
            "bytes": sum(last.files.values()),
            "averages": last.averages,
            "bad_steps": last.bad_steps,
            "undone": last.undone,
            "lost": last.lost,
            "snapshots": len([key for step, key in listing(store, SNAPSHOTS) if key == manifest_of(step, SNAPSHOTS)]),
            "identity": last.identity,
        }
    return state


def contents(store: Store, kind: str = CHECKPOINTS) -> dict[int, list[str]]:
    """The keys in the folder of each step, whether its checkpoint is whole or not. Folders with other names belong to no step."""
    found: dict[int, list[str]] = {}
    for info in store.list(f"{kind}/"):
        if (step := _step_of(info.key)) >= 0:
            found.setdefault(step, []).append(info.key)
    return found


def manifests(store: Store, kind: str = CHECKPOINTS) -> list[str]:
    """Keys of all manifests, newest first, those in folders of no step last."""
    return [key for _, key in listing(store, kind)]


def listing(store: Store, kind: str) -> list[tuple[int, str]]:
    """(step of its folder, key) of all manifests, newest first; what stands in the folder of no step has -1."""
    keys = [info.key for info in store.list(f"{kind}/") if info.key.endswith(MANIFEST)]
    return sorted(((_step_of(key), key) for key in keys), reverse=True)


def _step_of(key: str) -> int:
    """The step in whose folder a key stands, -1 for none: "step-00000500 (copy)", "old/step-00000500"."""
    kind, folder, *_ = key.split("/")
    digits = folder.removeprefix("step-")
    step = int(digits) if digits.isdecimal() else -1
    return step if step >= 0 and key.startswith(f"{folder_of(step, kind)}/") else -1
