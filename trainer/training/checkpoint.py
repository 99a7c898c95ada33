"""Checkpoints as fragments: any world size and any ZeRO stage reads what any other wrote.

Each rank writes one safetensors file with the values it owns: fp32 weights, AdamW's moments, the averages; each tensor is a
piece of one flattened parameter. `manifest.json` is written last and lists every piece (kind, parameter, offset, where its
bytes stand, CRC-32) under a checksum of its own, so a checkpoint without a manifest does not exist, and a reader takes the pieces
that overlap what it needs by ranged reads, without conversion and without pickle.

    checkpoints/step-00000500/rank-00000-9f86d081884c.safetensors ... rank-00007-..., manifest.json
    snapshots/step-00000500/...      the power-function averages alone: they stay when the checkpoint goes

Readers take the names of files from the manifest. They end with the first digits of the content's SHA-256: none ever changes.
A checkpoint stands in the folder of the step that its manifest states; copies in other folders are passed over. Averages may be
lost and the weights and moments be there: then a training goes on without them, if it is told to (`train.lost_averages`).

There is one resume mechanism: every start looks for the newest checkpoint that is whole. `trainer.training.writer` writes them.
"""

import contextlib
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from freeguide.configs.errors import CheckpointError, StoreError
from freeguide.configs.untrusted import JSON_BYTES, parse_json, whole
from freeguide.data_pipeline.order import FIRST_ROUNDS
from freeguide.data_pipeline.store.base import MissingObject, Store, checked
from freeguide.trainer.training.ema import Ema, reconstruction, sigma_rel_of
from freeguide.trainer.training.engine import KINDS, Engine, Fragment

FORMAT = 1
EMA = "ema"
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
MANIFEST = "/manifest.json"
ROUNDS = "order.rounds"  # what a run keeps as it began, whatever is the default by now
DATA, CONTENT = "data.fingerprint", "data.content"  # the second is the same without the names of the classes
_UNRECORDED = ["train.ema_decay"]  # what the identity in older manifests does not say
_LISTINGS = 10  # of a run that deletes what was listed before it can be read
_READ = 32 * 2**20  # bytes of one ranged read at most, unless one piece is larger
_RESTORE = "restore it from a copy"
_KEPT = "a training keeps its newest checkpoints only: name one of those, or have train.keep_every keep more"
_log = logging.getLogger("freeguide.checkpoint")


@dataclass(frozen=True)
class Piece:
    """Values [offset, offset + numel) of one flattened parameter, as bytes [begin, begin + 4 * numel) of `file`."""

    file: str
    kind: str
    name: str
    offset: int
    numel: int
    begin: int
    crc32: int


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: what its manifest says."""

    key: str
    sha256: str  # of the manifest, which holds a checksum of everything else
    step: int
    adam_steps: int
    loss_scale: dict[str, float]  # state of fp16's loss scaling, else empty
    bad_steps: list[int]  # steps so far whose gradients were not finite
    undone: int  # the last of the steps whose updates were undone, 0: none
    world_size: int  # that wrote it
    zero_stage: int
    identity: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, int]  # key -> bytes
    pieces: list[Piece]
    snapshots: tuple[int, ...] | None = None  # steps of the run's snapshots up to this one; None: older manifests do not say
    lost: dict[str, str] = field(default_factory=dict)  # averages whose files are not there, and what is wrong

    @property
    def rounds(self) -> int:
        """Of the order's permutations."""
        return int(self.identity.get(ROUNDS, FIRST_ROUNDS))

    @property
    def averages(self) -> list[str]:
        """Names of the averages that it holds."""
        return [name for name in self.kept if name not in self.lost]

    @cached_property
    def kept(self) -> list[str]:
        """Names of the averages that it was saved with."""
        return sorted({piece.kind for piece in self.pieces} - set(KINDS))


def survey(store: Store, kind: str = CHECKPOINTS) -> Iterator[Checkpoint | CheckpointError]:
    """The checkpoints (or SNAPSHOTS) of a run, newest first: each as its manifest says, or what is wrong with it.

    A run that goes on deletes older ones, which are passed over. Where all that were listed may have gone, it has saved newer ones
    before, and they are listed again. Raises CheckpointError for a run that is always faster.
    """
    seen: set[str] = set()
    for _ in range(_LISTINGS):
        found_one = gone = False
        listed = _listed(store, kind)
        steps = {step for step, key in listed if key == manifest_of(step, kind)}
        turns = []
        for step, key in listed:
            if key not in seen:
                seen.add(key)
                with contextlib.suppress(MissingObject):
                    turns.append((step if step >= 0 else stated_step(store, key) or -1, key))
        for _, key in sorted(turns, reverse=True):
            try:
                found = _parsed(store, key)
                if key == manifest_of(found.step, kind):
                    yield _present(store, found)
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
        raise CheckpointError(f"{store.uri}: no whole checkpoint of step {step}, only of {', '.join(others[::-1])}; {_KEPT}")
    if damaged:
        raise damaged[0]
    raise CheckpointError(f"{store.uri}: no checkpoint; run `freeguide train` first, or name the run as run=URI")


def read_manifest(store: Store, key: str) -> Checkpoint:
    """Raises CheckpointError if the manifest is damaged, of another format, or names a file that is missing or of another size.

    A snapshot's file that is missing or of another size costs a checkpoint the averages in it: they are `lost`.
    Raises MissingObject if there is no such checkpoint, or no more: a training deletes the manifest before the files.
    """
    return _present(store, _parsed(store, key))


def _present(store: Store, found: Checkpoint) -> Checkpoint:
    """Raises as `read_manifest` does for files."""
    key = found.key
    folders = {file.rsplit("/", 1)[0] for file in found.files}
    present = {info.key: info.bytes for folder in folders for info in store.list(f"{folder}/")}
    wrong = {
        file: f"{store.uri}/{file}: has {present.get(file, 'no')} bytes, its checkpoint says {size}"
        for file, size in found.files.items()
        if present.get(file) != size
    }
    lost = {piece.kind: wrong[piece.file] for piece in found.pieces if piece.file in wrong}
    needed = [why for file, why in wrong.items() if file.split("/")[0] == key.split("/")[0]]
    if needed or lost.keys() & set(KINDS):
        store.stat(key)
        raise CheckpointError(f"{next(iter(needed or lost.values()))}; {_RESTORE}")
    return replace(found, lost=lost)


def stated_step(store: Store, key: str) -> int | None:
    """The step that the manifest at `key` states, None where it is damaged. Raises MissingObject."""
    try:
        return _parsed(store, key).step
    except CheckpointError:
        return None


def _parsed(store: Store, key: str) -> Checkpoint:
    """What a manifest says, whatever became of the files that it names. Raises as `read_manifest` does."""
    place = f"{store.uri}/{key}"
    try:
        if (size := store.stat(key).bytes) > JSON_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        data = store.get(key)
        manifest = parse_json(data)
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{place}: checkpoint format {manifest['format']!r:.40}, this version reads {FORMAT}; use the version that wrote it"
            )
        _check_seal(manifest)
        found = Checkpoint(
            key=key,
            sha256=hashlib.sha256(data).hexdigest(),
            step=whole(manifest["step"]),
            adam_steps=whole(manifest["adam_steps"]),
            loss_scale={str(name): float(value) for name, value in manifest.get("loss_scale", {}).items()},
            bad_steps=[whole(step) for step in manifest.get("bad_steps", [])],
            undone=whole(manifest.get("undone", 0)),
            world_size=whole(manifest["world_size"], 1),
            zero_stage=whole(manifest["zero_stage"], most=3),
            identity=dict(manifest["identity"]),
            shapes={name: tuple(whole(side) for side in shape) for name, shape in manifest["shapes"].items()},
            files={checked(file["key"]): whole(file["bytes"]) for file in manifest["files"]},
            pieces=[Piece(file["key"], *piece) for file in manifest["files"] for piece in file["pieces"]],
            snapshots=tuple(whole(step) for step in manifest["snapshots"]) if "snapshots" in manifest else None,
        )
        _check_places(found)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{place}: damaged checkpoint manifest ({type(error).__name__}: {error}); {_RESTORE}") from error
    return found


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as it is stored: with the SHA-256 of the rest of it."""
    return json.dumps(manifest | {"sha256": _checksum(manifest)}).encode()


def unsealed(data: bytes) -> Any:
    """What `sealed` was given. Raises ValueError where that is not what this is."""
    manifest = parse_json(data)
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise ValueError("it has no checksum")
    _check_seal(manifest)
    return manifest


def _check_seal(manifest: dict[str, Any]) -> None:
    """Takes the checksum out; older manifests have none. Raises ValueError where it does not fit to the rest."""
    stated = manifest.pop("sha256", None)
    if stated is not None and stated != _checksum(manifest):
        raise ValueError("its checksum does not fit")


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_places(checkpoint: Checkpoint) -> None:
    """Raises ValueError for a file outside the run's checkpoints, or a piece outside its file or its parameter.

    No byte and no value stands in two pieces, so that what a checkpoint claims to hold is never more than its files do hold.
    """
    for file in checkpoint.files:
        if file.split("/")[0] not in (CHECKPOINTS, SNAPSHOTS):
            raise ValueError(f"it names the file {file}")
    places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for piece in checkpoint.pieces:
        if not isinstance(piece.kind, str):
            raise ValueError(f"it has a piece of kind {piece.kind!r:.40}")
        room = math.prod(checkpoint.shapes[piece.name])
        offset, numel, begin = whole(piece.offset), whole(piece.numel, 1), whole(piece.begin)
        whole(piece.crc32)
        if offset + numel > room or begin + 4 * numel > checkpoint.files[piece.file]:
            raise ValueError(f"a piece of {piece.name} lies outside it or its file")
        places.setdefault((piece.file,), []).append((begin, begin + 4 * numel))
        places.setdefault((piece.kind, piece.name), []).append((offset, offset + numel))
    for spans in places.values():
        spans.sort()
        if any(after < end for (_, end), (after, _) in pairwise(spans)):
            raise ValueError("two of its pieces overlap")


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

    With `before`, the newest one of an earlier step that `every` divides, and None where there is none: a run may go back.
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
        check_shapes(store, checkpoint, engine.shapes)
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
            damage = _without(checkpoint, lost)
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


def candidates(
    store: Store, names: Sequence[str] = (), drop: bool = False, without: list[str] | None = None
) -> Iterator[Checkpoint]:
    """The checkpoints that a run with the averages `names` can go on from, newest first: those that have all, or any with `drop`.

    Raises CheckpointError where there are some, and none is left. `without` are those that could be gone on from with `drop`; who
    finds that more averages are lost than the manifests tell adds to it.
    """
    count, without = 0, [] if without is None else without
    for found in survey(store):
        count += 1
        for each in _usable(found):
            lost = {name: why for name, why in each.lost.items() if name in names}
            if lost and not drop:
                without.append(_without(each, lost))
                _log.warning("%s; trying the one before it", without[-1])
                continue
            yield each
    if count:
        choice = f"{without[0]}: {_RESTORE}, or go on without by train.lost_averages=drop" if without else "restore one from a copy"
        raise CheckpointError(
            f"{store.uri}: none of its {count} checkpoints can be used as it is; {choice}, or begin anew at another run=URI"
        )


def _without(checkpoint: Checkpoint, lost: dict[str, str]) -> str:
    why = next(iter(lost.values())).removesuffix(f"; {_RESTORE}")
    return f"the training state of step {checkpoint.step} is there, but its averages {', '.join(sorted(lost))} are not ({why})"


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

    Raises CheckpointError for an average that the run does not keep and that cannot be reconstructed, and where snapshots are lost;
    with `lost` (`sampling.lost_snapshots`) those that are left are read and checked, and the best is made of the good ones.
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
    """The weights that `recipe` says how to make, as `load` returns them. Raises as both do."""
    made = recipe(store, checkpoint, name, lost)
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
        steps = tuple(step for step, key in _listed(store, SNAPSHOTS) if key == manifest_of(step, SNAPSHOTS))
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
            broken[step] = str(error).removesuffix(f"; {_RESTORE}")
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
        for _ in _read(store, [piece for piece in checkpoint.pieces if piece.kind in kinds]):
            pass
    except (CheckpointError, MissingObject) as error:
        return str(error).removesuffix(f"; {_RESTORE}")
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


def load(store: Store, checkpoint: Checkpoint, kind: str = EMA) -> dict[str, Tensor]:
    """One kind of values by parameter name, fp32 on the CPU: an average, the weights ("master") or a moment. No process group."""
    pieces = [piece for piece in checkpoint.pieces if piece.kind == kind]
    held = dict.fromkeys(checkpoint.shapes, 0)
    for piece in pieces:
        held[piece.name] += piece.numel
    for name, count in held.items():
        if count != math.prod(checkpoint.shapes[name]):  # before anything is allocated
            raise CheckpointError(
                f"{store.uri}/{checkpoint.key}: holds {count} of {math.prod(checkpoint.shapes[name])} {kind} values of {name}; "
                f"{_RESTORE}"
            )
    flat = {name: torch.zeros(math.prod(shape)) for name, shape in checkpoint.shapes.items()}
    try:
        for piece, values in _read(store, pieces):
            flat[piece.name][piece.offset : piece.offset + piece.numel] = values
    except MissingObject as error:
        raise CheckpointError(f"{store.uri}/{checkpoint.key}: deleted while it was read; {_KEPT}") from error
    return {name: values.view(checkpoint.shapes[name]) for name, values in flat.items()}


def _stage(
    store: Store, checkpoint: Checkpoint, engine: Engine, ema: Ema, lost: dict[str, str]
) -> list[tuple[str, Tensor, Tensor]]:
    """(kind, live tensor, its new values) for everything this rank holds. Adds to `lost` the averages that cannot be read, and why.

    Raises CheckpointError or StoreError where weights or moments cannot be.
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
    """The values of one kind of each fragment. Raises CheckpointError where they are damaged or incomplete."""
    targets = [torch.full((fragment.numel,), math.nan) for fragment in fragments]
    covered = [0] * len(fragments)
    by_name: dict[str, list[int]] = {}
    for i, fragment in enumerate(fragments):
        by_name.setdefault(fragment.name, []).append(i)
    pieces = [p for p in checkpoint.pieces if p.kind == kind and any(_overlap(p, fragments[i]) for i in by_name.get(p.name, []))]
    for piece, values in _read(store, pieces):
        for i in by_name[piece.name]:
            if both := _overlap(piece, fragments[i]):
                begin, end = both
                targets[i][begin - fragments[i].offset : end - fragments[i].offset] = values[
                    begin - piece.offset : end - piece.offset
                ]
                covered[i] += end - begin
    for fragment, count in zip(fragments, covered, strict=True):
        if count != fragment.numel:
            raise CheckpointError(f"{store.uri}/{checkpoint.key}: does not hold all {kind} values of {fragment.name}; {_RESTORE}")
    return targets


def _overlap(piece: Piece, fragment: Fragment) -> tuple[int, int] | None:
    begin, end = max(piece.offset, fragment.offset), min(piece.offset + piece.numel, fragment.offset + fragment.numel)
    return (begin, end) if begin < end else None


def _read(store: Store, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """The values of every piece, neighbours fetched together, each checked against its CRC-32."""
    run: list[Piece] = []
    for piece in [*sorted(pieces, key=lambda p: (p.file, p.begin)), None]:
        joins = piece is not None and run and piece.file == run[-1].file and piece.begin == run[-1].begin + 4 * run[-1].numel
        if piece is not None and joins and piece.begin + 4 * piece.numel - run[0].begin <= _READ:
            run.append(piece)
            continue
        if run:
            start, end = run[0].begin, run[-1].begin + 4 * run[-1].numel
            data = bytearray(store.get_range(run[0].file, start, end - start))
            for part in run:
                at = part.begin - start
                if zlib.crc32(memoryview(data)[at : at + 4 * part.numel]) != part.crc32:
                    raise CheckpointError(
                        f"{store.uri}/{part.file}: {part.kind} values of {part.name} at byte {part.begin} are damaged; {_RESTORE}"
                    )
                yield part, torch.frombuffer(data, dtype=torch.float32, count=part.numel, offset=at)
        run = [piece] if piece is not None else []


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


def check_shapes(store: Store, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError, naming the first parameter that differs, if the network is another one."""
    for name in sorted(shapes.keys() | checkpoint.shapes.keys()):
        then, now = checkpoint.shapes.get(name), shapes.get(name)
        if then != now:
            raise CheckpointError(
                f"{store.uri}: parameter {name} has shape {then} in the checkpoint and {now} in this network; name another run=URI"
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
            "snapshots": len([key for step, key in _listed(store, SNAPSHOTS) if key == manifest_of(step, SNAPSHOTS)]),
            "identity": last.identity,
        }
    return state


def folder_of(step: int, kind: str = CHECKPOINTS) -> str:
    return f"{kind}/step-{step:08d}"


def manifest_of(step: int, kind: str = CHECKPOINTS) -> str:
    return f"{folder_of(step, kind)}{MANIFEST}"


def contents(store: Store, kind: str = CHECKPOINTS) -> dict[int, list[str]]:
    """The keys in the folder of each step, whether its checkpoint is whole or not. Folders with other names belong to no step."""
    found: dict[int, list[str]] = {}
    for info in store.list(f"{kind}/"):
        if (step := _step_of(info.key)) >= 0:
            found.setdefault(step, []).append(info.key)
    return found


def manifests(store: Store, kind: str = CHECKPOINTS) -> list[str]:
    """Keys of all manifests, newest first, those in folders of no step last."""
    return [key for _, key in _listed(store, kind)]


def _listed(store: Store, kind: str) -> list[tuple[int, str]]:
    """(step of its folder, key) of all manifests, newest first; what stands in the folder of no step has -1."""
    keys = [info.key for info in store.list(f"{kind}/") if info.key.endswith(MANIFEST)]
    return sorted(((_step_of(key), key) for key in keys), reverse=True)


def _step_of(key: str) -> int:
    """The step in whose folder a key stands, -1 for none: "step-00000500 (copy)", "old/step-00000500"."""
    kind, folder, *_ = key.split("/")
    digits = folder.removeprefix("step-")
    step = int(digits) if digits.isdecimal() else -1
    return step if step >= 0 and key.startswith(f"{folder_of(step, kind)}/") else -1
