"""Checkpoints as fragments: any world size and any ZeRO stage reads what any other wrote.

Each rank writes one safetensors file with the values it owns: fp32 weights, AdamW's moments, the averages; each tensor is a
piece of one flattened parameter. `manifest.json` is written last and lists every piece (kind, parameter, offset, where its
bytes stand, CRC-32) under a checksum of its own, so a checkpoint without a manifest does not exist, and a reader takes the pieces
that overlap what it needs by ranged reads, without conversion and without pickle.

    checkpoints/step-00000500/rank-00000-9f86d081884c.safetensors ... rank-00007-..., manifest.json
    snapshots/step-00000500/...      the power-function averages alone: they stay when the checkpoint goes

Readers take the names of files from the manifest. They end with the first digits of the content's SHA-256: none ever changes.

There is one resume mechanism: every start looks for the newest checkpoint that is whole. `trainer.writer` writes them.
"""

import hashlib
import json
import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import CheckpointError, StoreError
from data_pipeline.order import FIRST_ROUNDS
from data_pipeline.store import MissingObject, Store
from trainer.ema import Ema, reconstruction, sigma_rel_of
from trainer.engine import KINDS, Engine, Fragment

FORMAT = 1
EMA = "ema"
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
MANIFEST = "/manifest.json"
ROUNDS = "order.rounds"  # what a run keeps as it began, whatever is the default by now
DATA, CONTENT = "data.fingerprint", "data.content"  # the second is the same without the names of the classes
_UNRECORDED = ["train.ema_decay"]  # what the identity in older manifests does not say
_LISTINGS = 10  # of a run that deletes what was listed before it can be read
_READ = 32 * 2**20  # bytes of one ranged read at most, unless one piece is larger
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

    @property
    def rounds(self) -> int:
        """Of the order's permutations."""
        return int(self.identity.get(ROUNDS, FIRST_ROUNDS))

    @property
    def averages(self) -> list[str]:
        """Names of the averages that it holds."""
        return sorted({piece.kind for piece in self.pieces} - set(KINDS))


def survey(store: Store, kind: str = CHECKPOINTS) -> Iterator[Checkpoint | CheckpointError]:
    """The checkpoints (or SNAPSHOTS) of a run, newest first: each as its manifest says, or what is wrong with it.

    A run that goes on deletes older ones, which are passed over. Where all that were listed may have gone, it has saved newer ones
    before, and they are listed again. Raises CheckpointError for a run that is always faster.
    """
    seen: set[str] = set()
    for _ in range(_LISTINGS):
        whole = gone = False
        for key in manifests(store, kind):
            if key in seen:
                continue
            seen.add(key)
            try:
                yield read_manifest(store, key)
                whole = True
            except MissingObject:
                gone = True
            except CheckpointError as error:
                yield error
        if whole or not gone:
            return
    raise CheckpointError(
        f"{store.uri}: its {kind} were deleted before they could be read, {_LISTINGS} times in a row; "
        f"have train.keep_checkpoints keep more"
    )


def newest(store: Store, kind: str = CHECKPOINTS) -> Iterator[Checkpoint]:
    """Those of `survey` that are whole."""
    for found in survey(store, kind):
        yield from _whole(found)


def _whole(found: Checkpoint | CheckpointError) -> Iterator[Checkpoint]:
    """`found`, or a warning that names what is wrong with it."""
    if isinstance(found, Checkpoint):
        yield found
    else:
        _log.warning("%s; trying the one before it", found)


def find(store: Store, step: int = 0) -> Checkpoint:
    """The whole checkpoint of `step`, or the newest for 0. Raises CheckpointError if there is none."""
    others = []
    for found in newest(store):
        if step in (0, found.step):
            return found
        others.append(str(found.step))
    if others:
        raise CheckpointError(f"{store.uri}: no whole checkpoint of step {step}, only of {', '.join(others[::-1])}; {_KEPT}")
    raise CheckpointError(f"{store.uri}: no checkpoint; run `freeguide train` first, or name the run as run=URI")


def read_manifest(store: Store, key: str) -> Checkpoint:
    """Raises CheckpointError if the manifest is damaged, of another format, or names a file that is missing or of another size.

    Raises MissingObject if there is no such checkpoint, or no more: a training deletes the manifest before the files.
    """
    place = f"{store.uri}/{key}"
    try:
        data = store.get(key)
        manifest = json.loads(data)
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{place}: checkpoint format {manifest['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        stated = manifest.pop("sha256", None)  # older manifests have none
        if stated is not None and stated != _checksum(manifest):
            raise ValueError("its checksum does not fit")
        found = Checkpoint(
            key=key,
            sha256=hashlib.sha256(data).hexdigest(),
            step=int(manifest["step"]),
            adam_steps=int(manifest["adam_steps"]),
            loss_scale=dict(manifest.get("loss_scale", {})),
            bad_steps=[int(step) for step in manifest.get("bad_steps", [])],
            undone=int(manifest.get("undone", 0)),
            world_size=int(manifest["world_size"]),
            zero_stage=int(manifest["zero_stage"]),
            identity=dict(manifest["identity"]),
            shapes={name: tuple(shape) for name, shape in manifest["shapes"].items()},
            files={file["key"]: int(file["bytes"]) for file in manifest["files"]},
            pieces=[Piece(file["key"], *piece) for file in manifest["files"] for piece in file["pieces"]],
        )
        _check_places(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{place}: damaged checkpoint manifest ({type(error).__name__}: {error}); delete this checkpoint"
        ) from error
    folders = {file.rsplit("/", 1)[0] for file in found.files}
    present = {info.key: info.bytes for folder in folders for info in store.list(f"{folder}/")}
    for file, size in found.files.items():
        if present.get(file) != size:
            store.stat(key)
            raise CheckpointError(
                f"{store.uri}/{file}: has {present.get(file, 'no')} bytes, its checkpoint says {size}; delete this checkpoint"
            )
    return found


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as it is stored: with the SHA-256 of the rest of it."""
    return json.dumps(manifest | {"sha256": _checksum(manifest)}).encode()


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_places(checkpoint: Checkpoint) -> None:
    """Raises ValueError for a file outside the run's checkpoints, or a piece outside its file or its parameter."""
    for file in checkpoint.files:
        if file.split("/")[0] not in (CHECKPOINTS, SNAPSHOTS) or ".." in file:
            raise ValueError(f"it names the file {file}")
    for piece in checkpoint.pieces:
        room = math.prod(checkpoint.shapes[piece.name])
        inside = piece.offset >= 0 and piece.numel > 0 and piece.offset + piece.numel <= room
        if not inside or piece.begin < 0 or piece.begin + 4 * piece.numel > checkpoint.files[piece.file]:
            raise ValueError(f"a piece of {piece.name} lies outside it or its file")


def resume(store: Store, engine: Engine, ema: Ema, identity: dict[str, Any], before: int = 0, every: int = 1) -> Checkpoint | None:
    """Load the newest whole checkpoint into `engine` and `ema` and return it; None for a new run.

    With `before`, the newest one of an earlier step that `every` divides, and None where there is none: a run may go back.
    All ranks call it together and take the same checkpoint. Everything is read and checked before a weight is touched.
    Raises CheckpointError if the run was started with another network, data set, seed or fewer averages, or if there are
    checkpoints and none can be used.
    """
    earlier = (c for c in newest(store) if c.step < before and c.step % every == 0)
    offers = (earlier if before else candidates(store)) if engine.rank == 0 else iter(())
    while (checkpoint := _offer(offers)) is not None:
        check_identity(store, checkpoint, identity)
        check_shapes(store, checkpoint, engine.shapes)
        check_averages(store, checkpoint, [p.name for p in ema.profiles])
        try:
            staged, damage = _stage(store, checkpoint, engine, ema), ""
        except (CheckpointError, StoreError) as error:
            staged, damage = [], str(error)
        damages: list[str] = [""] * engine.world_size
        dist.all_gather_object(damages, damage)
        if any(damages):
            if engine.rank == 0:
                _log.warning("%s; trying the checkpoint before it", next(d for d in damages if d))
            continue
        with torch.no_grad():
            for live, values in staged:
                live.copy_(values)
        engine.loaded(checkpoint.adam_steps, checkpoint.loss_scale)
        return checkpoint
    return None


def candidates(store: Store) -> Iterator[Checkpoint]:
    """The checkpoints that a run can go on from, newest first. Raises CheckpointError where there are some, and none is left."""
    count = 0
    for found in survey(store):
        count += 1
        yield from _whole(found)
    if count:
        raise CheckpointError(
            f"{store.uri}: none of its {count} checkpoints can be used; "
            f"restore one, or delete {store.uri}/{CHECKPOINTS} to begin anew"
        )


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


def snapshots_of(store: Store, checkpoint: Checkpoint, name: str) -> list[Checkpoint]:
    """The snapshots from which `average` makes `name`; none where the checkpoint itself holds it."""
    if name in (*checkpoint.averages, "master") or not sigma_rel_of(name):
        return []
    return [snapshot for snapshot in newest(store, SNAPSHOTS) if snapshot.step <= checkpoint.step]


def average(store: Store, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The weights that `sampling.ema` names, as `load` returns them: a stored average, "master", or a reconstructed sigma_rel_X.

    Raises CheckpointError for an average that the run does not keep and that cannot be reconstructed.
    """
    if name in (*checkpoint.averages, "master"):
        return load(store, checkpoint, name)
    stored = [(s, kind) for s in snapshots_of(store, checkpoint, name) for kind in s.averages]
    if not stored:
        raise CheckpointError(
            f"{store.uri}/{checkpoint.key}: holds no average {name}; set sampling.ema to one of "
            f"{', '.join([*checkpoint.averages, 'master'])}"
        )
    times = [(snapshot.step, sigma_rel_of(kind)) for snapshot, kind in stored]
    coefficients, distance = reconstruction(times, checkpoint.step, sigma_rel_of(name))
    _log.info("%s from %d snapshots, its profile met to %.1e", name, len(stored), distance)
    sums = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in checkpoint.shapes.items()}
    for (snapshot, kind), x in zip(stored, coefficients.tolist(), strict=True):
        for key, values in load(store, snapshot, kind).items():
            sums[key].add_(values, alpha=x)  # in float64: coefficients of both signs cancel
    return {key: values.float() for key, values in sums.items()}


def load(store: Store, checkpoint: Checkpoint, kind: str = EMA) -> dict[str, Tensor]:
    """One kind of values by parameter name, fp32 on the CPU: an average, the weights ("master") or a moment. No process group."""
    flat = {name: torch.zeros(math.prod(shape)) for name, shape in checkpoint.shapes.items()}
    seen = dict.fromkeys(flat, 0)
    try:
        for piece, values in _read(store, [p for p in checkpoint.pieces if p.kind == kind]):
            flat[piece.name][piece.offset : piece.offset + piece.numel] = values
            seen[piece.name] += piece.numel
    except MissingObject as error:
        raise CheckpointError(f"{store.uri}/{checkpoint.key}: deleted while it was read; {_KEPT}") from error
    for name, values in flat.items():
        if seen[name] != values.numel():
            raise CheckpointError(
                f"{store.uri}/{checkpoint.key}: holds {seen[name]} of {values.numel()} {kind} values of {name}; delete it"
            )
    return {name: values.view(checkpoint.shapes[name]) for name, values in flat.items()}


def _stage(store: Store, checkpoint: Checkpoint, engine: Engine, ema: Ema) -> list[tuple[Tensor, Tensor]]:
    """(live tensor, its new values) for everything this rank holds."""
    wanted: list[tuple[str, Fragment, Tensor]] = [(kind, f, engine.values(f, kind)) for kind in KINDS for f in engine.fragments]
    wanted += [(name, f, values) for name, own in ema.values.items() for f, values in zip(ema.fragments, own, strict=True)]
    by_name: dict[tuple[str, str], list[tuple[Fragment, Tensor]]] = {}
    staged = []
    for kind, fragment, live in wanted:
        staged.append((live, torch.full((fragment.numel,), math.nan)))
        by_name.setdefault((kind, fragment.name), []).append((fragment, staged[-1][1]))
    overlapping = [p for p in checkpoint.pieces if any(_overlap(p, f) for f, _ in by_name.get((p.kind, p.name), []))]
    covered: dict[int, int] = {}
    for piece, values in _read(store, overlapping):
        for fragment, target in by_name[piece.kind, piece.name]:
            if both := _overlap(piece, fragment):
                begin, end = both
                target[begin - fragment.offset : end - fragment.offset] = values[begin - piece.offset : end - piece.offset]
                covered[id(target)] = covered.get(id(target), 0) + end - begin
    for (kind, fragment, _), (_, target) in zip(wanted, staged, strict=True):
        if covered.get(id(target), 0) != fragment.numel:
            raise CheckpointError(
                f"{store.uri}/{checkpoint.key}: does not hold all {kind} values of {fragment.name}; delete this checkpoint"
            )
    return staged


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
                        f"{store.uri}/{part.file}: {part.kind} values of {part.name} at byte {part.begin} are damaged; delete it"
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


def check_averages(store: Store, checkpoint: Checkpoint, names: list[str]) -> None:
    """Raises CheckpointError for an average that the run has not kept so far: begun now, it would be another one."""
    for name in names:
        if name not in checkpoint.averages:
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
            "snapshots": len(manifests(store, SNAPSHOTS)),
            "identity": last.identity,
        }
    return state


def folder_of(step: int, kind: str = CHECKPOINTS) -> str:
    return f"{kind}/step-{step:08d}"


def manifest_of(step: int, kind: str = CHECKPOINTS) -> str:
    return f"{folder_of(step, kind)}{MANIFEST}"


def contents(store: Store, kind: str = CHECKPOINTS) -> dict[int, list[str]]:
    """The keys in the folder of each step, whether its checkpoint is whole or not. Names that are not ours belong to no step."""
    found: dict[int, list[str]] = {}
    for info in store.list(f"{kind}/"):
        digits = info.key.split("/")[1].removeprefix("step-")
        if digits.isdecimal():
            found.setdefault(int(digits), []).append(info.key)
    return found


def manifests(store: Store, kind: str = CHECKPOINTS) -> list[str]:
    """Keys of all manifests, newest first."""
    return sorted((info.key for info in store.list(f"{kind}/") if info.key.endswith(MANIFEST)), reverse=True)
