"""A training goes on: the newest whole checkpoint, read into what each rank holds."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from freeguide.configs.errors import CheckpointError, StoreError
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.trainer.checkpoints.manifest import KINDS, RESTORE, Checkpoint, Piece
from freeguide.trainer.checkpoints.search import candidates, check_averages, check_identity, check_shapes, newest, without_averages
from freeguide.trainer.checkpoints.values import read_pieces
from freeguide.trainer.training.ema import Ema
from freeguide.trainer.training.engine import Engine, Fragment

_log = logging.getLogger("freeguide.checkpoint")


def resume(
    store: Store,
    engine: Engine,
    ema: Ema,
    identity: dict[str, Any],
    before: int = 0,
    every: int = 1,
    drop: bool = False,
) -> Checkpoint | None:
    """Load the newest whole checkpoint into `engine` and `ema` and return it; None for a new run.

    With `before`, the newest one of an earlier step that `every` divides, or None: so a run goes back.
    With `drop`, averages that are lost leave `ema`; else the newest checkpoint that has them all is taken.
    All ranks call it together and take the same checkpoint. Everything is read and checked before a weight is touched.
    Raises CheckpointError if the run was started with another network, data set, seed or fewer averages, or if there are
    checkpoints and none can be used.
    """
    names, without = [p.name for p in ema.profiles], list[str]()
    earlier = (c for c in newest(store) if c.step < before and c.step % every == 0)
    offers = (earlier if before else candidates(store, names, drop, without)) if engine.rank == 0 else iter(())
    while (checkpoint := _offer(offers)) is not None:
        check_identity(store, checkpoint, identity)
        check_shapes(store.uri, checkpoint.shapes, engine.shapes)
        check_averages(store, checkpoint, names, drop)
        lost: dict[str, str] = {name: checkpoint.lost.get(name, "") for name in names if name not in checkpoint.averages}
        try:
            staged, damage = _stage(store, checkpoint, engine, ema, lost), ""
        except (CheckpointError, StoreError) as error:
            staged, damage = [], str(error)
        told: list[tuple[str, dict[str, str]]] = [("", {})] * engine.world_size
        dist.all_gather_object(told, (damage, lost))
        damage = next((text for text, _ in told if text), "")
        lost = {name: why for _, each in told for name, why in each.items()}
        if not damage and lost and not drop:
            damage = without_averages(checkpoint, lost)
            without.append(damage)
        if damage:
            if engine.rank == 0:
                _log.warning("%s; trying the checkpoint before it", damage)
            continue
        with torch.no_grad():
            for name, live, values in staged:
                if name not in lost:
                    live.copy_(values)
        engine.loaded(checkpoint.adam_steps, checkpoint.loss_scale)
        if lost:
            ema.drop(lost)
            if engine.rank == 0:
                _log.warning("step %d goes on without the averages %s", checkpoint.step, ", ".join(sorted(lost)))
        return checkpoint
    return None


def _offer(offers: Iterator[Checkpoint]) -> Checkpoint | None:
    """Rank 0's next candidate on every rank. What rank 0 meets, every rank raises: none is left waiting."""
    offer: list[Any] = [None]
    try:
        offer = [next(offers, None)]
    except (StoreError, CheckpointError) as error:
        offer = [error]
    dist.broadcast_object_list(offer)
    if isinstance(offer[0], Exception):
        raise offer[0]
    found: Checkpoint | None = offer[0]
    return found


def _stage(
    store: Store, checkpoint: Checkpoint, engine: Engine, ema: Ema, lost: dict[str, str]
) -> list[tuple[str, Tensor, Tensor]]:
    """(kind, live tensor, its new values) for everything this rank holds. Adds to `lost` the averages that cannot be read, and why.

    Raises CheckpointError or StoreError if weights or moments cannot be read.
    """
    wanted = {kind: [(f, engine.values(f, kind)) for f in engine.fragments] for kind in KINDS}
    wanted |= {name: list(zip(ema.fragments, own, strict=True)) for name, own in ema.values.items() if name not in lost}
    staged = []
    for kind, live in wanted.items():
        try:
            values = _fragments(store, checkpoint, kind, [f for f, _ in live])
        except (CheckpointError, MissingObject) as error:
            if kind in KINDS:
                raise
            lost[kind] = str(error)
            continue
        staged += [(kind, to, new) for (_, to), new in zip(live, values, strict=True)]
    return staged


def _fragments(store: Store, checkpoint: Checkpoint, kind: str, fragments: Sequence[Fragment]) -> list[Tensor]:
    """The values of one kind of each fragment. Raises CheckpointError if they are damaged or incomplete."""
    targets = [torch.full((fragment.numel,), math.nan) for fragment in fragments]
    covered = [0] * len(fragments)
    by_name: dict[str, list[int]] = {}
    for i, fragment in enumerate(fragments):
        by_name.setdefault(fragment.name, []).append(i)
    pieces = [p for p in checkpoint.pieces if p.kind == kind and any(_overlap(p, fragments[i]) for i in by_name.get(p.name, []))]
    for piece, values in read_pieces(store, pieces):
        for i in by_name[piece.name]:
            if both := _overlap(piece, fragments[i]):
                begin, end = both
                targets[i][begin - fragments[i].offset : end - fragments[i].offset] = values[
                    begin - piece.offset : end - piece.offset
                ]
                covered[i] += end - begin
    for fragment, count in zip(fragments, covered, strict=True):
        if count != fragment.numel:
            raise CheckpointError(f"{store.uri}/{checkpoint.key}: does not hold all {kind} values of {fragment.name}; {RESTORE}")
    return targets


def _overlap(piece: Piece, fragment: Fragment) -> tuple[int, int] | None:
    begin, end = max(piece.offset, fragment.offset), min(piece.offset + piece.numel, fragment.offset + fragment.numel)
    return (begin, end) if begin < end else None
