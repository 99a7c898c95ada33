"""Checkpoints as fragments: any world size and any ZeRO stage reads what any other wrote.

Each rank writes one safetensors file with the values it owns: fp32 weights, AdamW's moments, the moving average; each tensor is
a piece of one flattened parameter. `manifest.json` is written last and lists every piece (kind, parameter, offset, where its
bytes stand, CRC-32), so a checkpoint without a manifest does not exist, and a reader takes the pieces that overlap what it
needs by ranged reads, without conversion and without pickle.

    checkpoints/step-00000500/rank-00000.safetensors ... rank-00007.safetensors, manifest.json

There is one resume mechanism: every start looks for the newest checkpoint that is whole.
"""

import hashlib
import json
import logging
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import CheckpointError, StoreError
from data_pipeline.store import Store
from trainer.ema import Ema
from trainer.engine import KINDS, Engine, Fragment

FORMAT = 1
EMA = "ema"
_READ = 32 * 2**20  # bytes of one ranged read at most, unless one piece is larger
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
    identity: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, int]  # key -> bytes
    pieces: list[Piece]


# --- writing ---


def save(store: Store, engine: Engine, ema: Ema, step: int, identity: dict[str, Any], keep: int) -> str:
    """Write the checkpoint of `step`, then delete all but the newest `keep`. All ranks call it together; returns its key.

    Raises StoreError on every rank if one of them cannot write; the checkpoints before it stay.
    """
    folder = _folder(step)
    own: dict[str, Any] = {"error": None}
    try:
        own |= _write_rank(store, f"{folder}/rank-{engine.rank:05d}.safetensors", engine, ema)
    except StoreError as error:
        own["error"] = str(error)
    ranks: list[dict[str, Any]] = [{} for _ in range(engine.world_size)]
    dist.all_gather_object(ranks, own)
    published = [""]
    if engine.rank == 0:
        published = [next((r["error"] for r in ranks if r["error"]), "") or _publish(store, folder, step, engine, identity, ranks)]
        if not published[0]:
            _delete_older(store, keep)
    dist.broadcast_object_list(published)
    if published[0]:
        raise StoreError(f"checkpoint of step {step}: {published[0]}")
    return folder


def _write_rank(store: Store, key: str, engine: Engine, ema: Ema) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    for i, f in enumerate(ema.fragments):
        for kind in KINDS:
            tensors[f"{kind}|{f.name}|{f.offset}"] = engine.values(f, kind).cpu()
        tensors[f"{EMA}|{f.name}|{f.offset}"] = ema.values[i].cpu()
    data = safetensors.torch.save({name: values.contiguous().clone() for name, values in tensors.items()})
    store.put(key, data)
    return {"key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pieces": _index(data)}


def _index(data: bytes) -> list[list[Any]]:
    """[kind, name, offset, numel, begin, crc32] of every tensor in a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    pieces = []
    for tensor, entry in header.items():
        kind, name, offset = tensor.split("|")
        begin, end = (8 + length + at for at in entry["data_offsets"])
        pieces.append([kind, name, int(offset), (end - begin) // 4, begin, zlib.crc32(memoryview(data)[begin:end])])
    return pieces


def _publish(store: Store, folder: str, step: int, engine: Engine, identity: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    manifest = {
        "format": FORMAT,
        "step": step,
        "adam_steps": engine.adam_steps,
        "world_size": engine.world_size,
        "zero_stage": engine.stage,
        "identity": identity,
        "shapes": engine.shapes,
        "files": [{name: r[name] for name in ("key", "bytes", "sha256", "pieces")} for r in ranks],
    }
    try:
        store.put(f"{folder}/manifest.json", json.dumps(manifest).encode())
    except StoreError as error:
        return str(error)
    return ""


def _delete_older(store: Store, keep: int) -> None:
    for key in _manifests(store)[keep:]:
        store.delete(key)  # first the manifest: from here on the checkpoint does not exist
        for leftover in store.list(key.rsplit("/", 1)[0] + "/"):
            store.delete(leftover.key)


# --- reading ---


def newest(store: Store) -> Iterator[Checkpoint]:
    """The checkpoints of a run, newest first, leaving out damaged ones with a warning that names what is wrong."""
    for key in _manifests(store):
        try:
            yield read_manifest(store, key)
        except CheckpointError as error:
            _log.warning("%s; trying the checkpoint before it", error)


def find(store: Store, step: int = 0) -> Checkpoint:
    """The whole checkpoint of `step`, or the newest for 0. Raises CheckpointError if there is none."""
    found = next((c for c in newest(store) if step in (0, c.step)), None)
    if found is None:
        which = f"no whole checkpoint of step {step}" if step else "no checkpoint"
        raise CheckpointError(f"{store.uri}: {which}; run `freeguide train` first, or name the run as run=URI")
    return found


def read_manifest(store: Store, key: str) -> Checkpoint:
    """Raises CheckpointError if the manifest is damaged, of another format, or names a file that is missing or of another size."""
    place = f"{store.uri}/{key}"
    try:
        data = store.get(key)
        manifest = json.loads(data)
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{place}: checkpoint format {manifest['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        found = Checkpoint(
            key=key,
            sha256=hashlib.sha256(data).hexdigest(),
            step=int(manifest["step"]),
            adam_steps=int(manifest["adam_steps"]),
            identity=dict(manifest["identity"]),
            shapes={name: tuple(shape) for name, shape in manifest["shapes"].items()},
            files={file["key"]: int(file["bytes"]) for file in manifest["files"]},
            pieces=[Piece(file["key"], *piece) for file in manifest["files"] for piece in file["pieces"]],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{place}: damaged checkpoint manifest ({type(error).__name__}: {error}); delete this checkpoint"
        ) from error
    present = {info.key: info.bytes for info in store.list(key.rsplit("/", 1)[0] + "/")}
    for file, size in found.files.items():
        if present.get(file) != size:
            raise CheckpointError(
                f"{store.uri}/{file}: has {present.get(file, 'no')} bytes, its checkpoint says {size}; delete this checkpoint"
            )
    return found


def resume(store: Store, engine: Engine, ema: Ema, identity: dict[str, Any]) -> int:
    """Load the newest whole checkpoint into `engine` and `ema`; returns the step to go on from, 0 for a new run.

    All ranks call it together and take the same checkpoint. Everything is read and checked before a weight is touched.
    Raises CheckpointError if the run was started with another network, data set or seed.
    """
    candidates = newest(store) if engine.rank == 0 else iter(())
    while True:
        offer: list[Any] = [next(candidates, None)]
        dist.broadcast_object_list(offer)
        checkpoint: Checkpoint | None = offer[0]
        if checkpoint is None:
            return 0
        check_identity(store, checkpoint, identity)
        check_shapes(store, checkpoint, engine.shapes)
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
        engine.loaded(checkpoint.adam_steps)
        return checkpoint.step


def load(store: Store, checkpoint: Checkpoint, kind: str = EMA) -> dict[str, Tensor]:
    """The averaged weights ("ema"), the weights ("master") or a moment by parameter name, fp32 on the CPU. Needs no process group."""
    flat = {name: torch.zeros(math.prod(shape)) for name, shape in checkpoint.shapes.items()}
    seen = dict.fromkeys(flat, 0)
    for piece, values in _read(store, [p for p in checkpoint.pieces if p.kind == kind]):
        flat[piece.name][piece.offset : piece.offset + piece.numel] = values
        seen[piece.name] += piece.numel
    for name, values in flat.items():
        if seen[name] != values.numel():
            raise CheckpointError(
                f"{store.uri}/{checkpoint.key}: holds {seen[name]} of {values.numel()} {kind} values of {name}; delete it"
            )
    return {name: values.view(checkpoint.shapes[name]) for name, values in flat.items()}


def _stage(store: Store, checkpoint: Checkpoint, engine: Engine, ema: Ema) -> list[tuple[Tensor, Tensor]]:
    """(live tensor, its new values) for everything this rank holds."""
    wanted: list[tuple[str, Fragment, Tensor]] = [(kind, f, engine.values(f, kind)) for kind in KINDS for f in engine.fragments]
    wanted += [(EMA, f, values) for f, values in zip(ema.fragments, ema.values, strict=True)]
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
    for name in sorted(identity.keys() | checkpoint.identity.keys()):
        then, now = checkpoint.identity.get(name), identity.get(name)
        if then != now:
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


def _folder(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def _manifests(store: Store) -> list[str]:

    return sorted((info.key for info in store.list("checkpoints/") if info.key.endswith("/manifest.json")), reverse=True)
