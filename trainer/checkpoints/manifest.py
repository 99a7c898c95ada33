"""Checkpoints as fragments: any world size and any ZeRO stage reads what any other wrote.

Each rank writes one safetensors file with the values it owns: fp32 weights, AdamW's moments, the averages; each tensor is a
piece of one flattened parameter. `manifest.json` is written last and lists every piece (kind, parameter, offset, where its
bytes stand, CRC-32) under a checksum of its own, so a checkpoint without a manifest does not exist, and a reader takes the pieces
that overlap what it needs by ranged reads, without conversion and without pickle.

    checkpoints/step-00000500/rank-00000-9f86d081884c.safetensors ... rank-00007-..., manifest.json
    snapshots/step-00000500/...      the power-function averages alone: they stay when the checkpoint goes

Readers take the names of files from the manifest. They end with the first digits of the content's SHA-256: none ever changes.
A checkpoint stands in the folder of the step that its manifest states; copies in other folders are passed over.

This module says what a manifest means and when it is damaged. Beside it: `search` (which checkpoints a run has, and which one is
taken), `values` (what they hold), `averages` and `profiles` (weights that are made of several). `trainer.training.writer` writes
them, and `trainer.training.resume` loads them into a training.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from freeguide.configs.errors import CheckpointError
from freeguide.configs.untrusted import JSON_BYTES, parse_json, whole
from freeguide.data_pipeline.order import FIRST_ROUNDS
from freeguide.data_pipeline.store.base import Store, checked

FORMAT = 1
KINDS = ("master", "exp_avg", "exp_avg_sq")  # fp32 weights and AdamW's two moments; all other kinds are averages
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
MANIFEST = "/manifest.json"
ROUNDS = "order.rounds"  # what a run keeps as it began, whatever is the default by now
RESTORE = "restore it from a copy"


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


def folder_of(step: int, kind: str = CHECKPOINTS) -> str:
    return f"{kind}/step-{step:08d}"


def manifest_of(step: int, kind: str = CHECKPOINTS) -> str:
    return f"{folder_of(step, kind)}{MANIFEST}"


def read_manifest(store: Store, key: str) -> Checkpoint:
    """Raises CheckpointError if the manifest is damaged, of another format, or names a file that is missing or of another size.

    A snapshot's file that is missing or of another size costs a checkpoint the averages in it: they are `lost`.
    Raises MissingObject if there is no such checkpoint, or no more: a training deletes the manifest before the files.
    """
    return present_files(store, parsed(store, key))


def present_files(store: Store, found: Checkpoint) -> Checkpoint:
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
        raise CheckpointError(f"{next(iter(needed or lost.values()))}; {RESTORE}")
    return replace(found, lost=lost)


def stated_step(store: Store, key: str) -> int | None:
    """The step that the manifest at `key` states, None if it is damaged. Raises MissingObject."""
    try:
        return parsed(store, key).step
    except CheckpointError:
        return None


def parsed(store: Store, key: str) -> Checkpoint:
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
        raise CheckpointError(f"{place}: damaged checkpoint manifest ({type(error).__name__}: {error}); {RESTORE}") from error
    return found


def checksummed(manifest: dict[str, Any]) -> bytes:
    """A manifest as it is stored: with the SHA-256 of the rest of it."""
    return json.dumps(manifest | {"sha256": _checksum(manifest)}).encode()


def verified(data: bytes) -> Any:
    """The manifest that `checksummed` was given. Raises ValueError if these bytes are not what it returned."""
    manifest = parse_json(data)
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise ValueError("it has no checksum")
    _check_seal(manifest)
    return manifest


def _check_seal(manifest: dict[str, Any]) -> None:
    """Take the checksum out; older manifests have none. Raises ValueError if it does not fit the rest."""
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
