"""Saving checkpoints off the step: the step stands still for one copy into host memory, the rest happens beside the training.

    all ranks         at a step boundary: copy what this rank owns into the bytes of its file              (`Writer.start`)
    a thread each     checksum and upload the file, then a note of what is in it
    all ranks         some steps later the ranks agree that all of them have uploaded                      (`Writer.boundary`)
    rank 0's thread   read the notes and write the manifest, which makes the checkpoint exist; delete older ones

Two trainings may be given one run: the same command twice, a worker that was thought dead. The later one claims the run with an
object that holds its token; the earlier one looks there before it publishes and before it deletes, and ends. Until then neither
touches what is the other's: the name of a file follows from its content, that of a note from the token.

Threads never take part in a collective: two threads that interleave collectives of one group in different orders on two ranks
stop for ever. What the ranks have to agree on travels with the training loop's own exchange (`failures.Agreement`); the rest
goes through the store. A failed upload is known at the next step boundary, on every rank.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from freeguide.configs.errors import CheckpointError, StoreError, UserError, visible
from freeguide.configs.schema import TrainConfig
from freeguide.configs.untrusted import JSON_BYTES
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.trainer.checkpoints.manifest import (
    CHECKPOINTS,
    FORMAT,
    KINDS,
    MANIFEST,
    SNAPSHOTS,
    checksummed,
    folder_of,
    manifest_of,
    read_manifest,
    stated_step,
    verified,
)
from freeguide.trainer.checkpoints.search import contents
from freeguide.trainer.training.ema import Ema
from freeguide.trainer.training.engine import Engine, Fragment

CLAIM = "writer.txt"  # in a run: which training has it
_log = logging.getLogger("freeguide.checkpoint")


class File:
    """One safetensors file of this rank, laid out once: every tensor is a view into its bytes, so that a copy is all it takes.

    `parts` are (kind, fragment, live values).
    """

    def __init__(self, name: str, parts: list[tuple[str, Fragment, Tensor]]) -> None:
        self.name = name
        header: dict[str, Any] = {}
        at = 0
        for kind, f, _ in parts:
            header[f"{kind}|{f.name}|{f.offset}"] = {"dtype": "F32", "shape": [f.numel], "data_offsets": [at, at + 4 * f.numel]}
            at += 4 * f.numel
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.data = bytearray(struct.pack("<Q", len(text)) + text) + bytearray(at)
        begins = [8 + len(text) + entry["data_offsets"][0] for entry in header.values()]
        self._pieces = [(kind, f.name, f.offset, f.numel, begin) for (kind, f, _), begin in zip(parts, begins, strict=True)]
        self._live = [values for _, _, values in parts]
        self._views = [torch.frombuffer(self.data, dtype=torch.float32, count=n, offset=b) for *_, n, b in self._pieces]

    @torch.no_grad()
    def copy(self) -> None:
        """Take the present values. On a GPU the copies end before this returns: the next step may change them."""
        for view, live in zip(self._views, self._live, strict=True):
            view.copy_(live)

    def note(self, step: int, rank: int) -> dict[str, Any]:
        """What the manifest has to know: key, size, SHA-256, and [kind, name, offset, numel, begin, crc32] of every tensor."""
        whole = memoryview(self.data)
        sha256 = hashlib.sha256(whole).hexdigest()
        key = f"{folder_of(step, self.name)}/rank-{rank:05d}-{sha256[:12]}.safetensors"
        pieces = [[*piece, zlib.crc32(whole[piece[4] : piece[4] + 4 * piece[3]])] for piece in self._pieces]
        return {"key": key, "bytes": len(self.data), "sha256": sha256, "pieces": pieces}


class Writer:
    """Writes the checkpoints of a run, and beside them the snapshots of its power-function averages, which are never deleted.

    The training goes on from `start`: what stands after that step, and was not saved since, is none of its past. `snapshots` are
    the steps of the snapshots that belong to its past, None: those that are there. Copies in folders of other names stay.

    `error` and `uploaded` (the step whose files of this rank are in the store) are what the ranks agree on.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        ema: Ema,
        identity: dict[str, Any],
        config: TrainConfig,
        start: int = 0,
        snapshots: Iterable[int] | None = None,
        before_manifest: Callable[[], object] = lambda: None,  # called by rank 0's thread
    ) -> None:
        self.error: UserError | None = None
        self.uploaded = 0
        self._store, self._engine, self._identity, self._config = store, engine, identity, config
        self._start, self._saved, self._before_manifest = start, set[int](), before_manifest
        self._snapshots = None if snapshots is None else set(snapshots)
        self._stated: dict[str, int | None] = {}  # steps that manifests state, see `_states`
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token)
        self._token = token[0]
        self._pending = 0  # the step whose checkpoint does not exist yet
        self._facts: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._publishing = False
        averages = {p.name: list(zip(ema.fragments, ema.values[p.name], strict=True)) for p in ema.profiles}
        power = [p.name for p in ema.profiles if p.sigma_rel]
        state = [(kind, f, engine.values(f, kind)) for kind in KINDS for f in ema.fragments]
        state += [(name, f, values) for name, own in averages.items() if name not in power for f, values in own]
        self._files = [File(CHECKPOINTS, state)]
        if power:
            self._files.append(File(SNAPSHOTS, [(name, f, values) for name in power for f, values in averages[name]]))

    def claim(self) -> None:
        """Take the run from any other training that may still write there, and delete what interrupted saves have left behind.

        Rank 0 calls it before the first step. Raises UserError where the disk has no room for a checkpoint.
        """
        self._store.put(CLAIM, self._claim())
        self._store.clean_up()
        if self._snapshots is None:
            listed = contents(self._store, SNAPSHOTS)
            self._snapshots = {at for at, keys in listed.items() if at <= self._start and manifest_of(at, SNAPSHOTS) in keys}
        try:
            self._clean_up_at_start()
        except (StoreError, CheckpointError) as error:
            _log.warning("%s; what interrupted saves have left behind stays for now", error)
        if isinstance(self._store, FolderStore):
            needed = self._engine.world_size * sum(len(file.data) for file in self._files)
            with contextlib.suppress(OSError):
                if (free := shutil.disk_usage(self._store.folder).free) < needed:
                    raise UserError(
                        f"{self._store.uri}: its disk has {free / 2**20:,.1f} MiB of room, and a checkpoint of this run takes "
                        f"{needed / 2**20:,.1f} MiB; make room or name another run=URI"
                    )

    def start(self, step: int, bad_steps: list[int], undone: int = 0) -> float:
        """Begin the checkpoint of `step`; all ranks call it together. Returns the seconds for which the training stood still.

        `bad_steps` and `undone` are those of `trainer.training.failures.Incidents`.
        It first waits for the checkpoint before, where that is still on its way. Raises as `finish` does.
        """
        began = time.perf_counter()
        self.finish()
        for file in self._files:
            file.copy()
        self._facts = {"step": step, "bad_steps": list(bad_steps), "undone": undone, **self._engine.counters()}
        self._pending = step
        self._run(self._upload)
        return time.perf_counter() - began

    def boundary(self, uploaded: int, failed: bool) -> None:
        """At a step boundary, with what the ranks agree on: the last step that all have uploaded, and whether one has failed.

        Raises as `finish` does where one has.
        """
        if failed:
            self._raise_if_any()
        if self._engine.rank == 0 and self._pending and uploaded == self._pending and not self._publishing:
            self._publishing = True
            self._join()
            self._run(self._publish)

    def finish(self) -> None:
        """Wait until the checkpoint under way exists; all ranks call it together.

        Raises on every rank StoreError if it cannot be saved, CheckpointError if another training has taken over the run.
        """
        if not self._pending:
            return
        self._join()
        self._raise_if_any()
        if self._engine.rank == 0 and not self._publishing:
            self._run(self._publish)
            self._join()
        self._raise_if_any()
        self._pending, self._publishing = 0, False

    def discard(self, after: int) -> None:
        """Let the checkpoints and snapshots of the steps after `after` exist no more: what they had learnt is undone.

        Rank 0 calls it, while no checkpoint is under way. Raises CheckpointError if another training has taken over the run.
        """
        unwanted = []
        for kind in (CHECKPOINTS, SNAPSHOTS):
            found = contents(self._store, kind)
            unwanted += [key for at, keys in found.items() if at > after and self._own(kind, at, keys) for key in keys]
        self._delete(unwanted)
        self._snapshots = {at for at in self._snapshots or () if at <= after}

    # --- in the thread ---

    def _upload(self) -> None:
        rank, step = self._engine.rank, self._pending
        notes = []
        for file in self._files:
            notes.append(file.note(step, rank))
            self._store.put(notes[-1]["key"], file.data)  # type: ignore[arg-type]  # a bytearray serves as bytes in every store
        self._store.put(self._note_key(rank), checksummed({"files": notes}))
        self.uploaded = step

    def _publish(self) -> None:
        engine, step = self._engine, self._pending
        self._before_manifest()
        self._check_claim()  # before the notes are read: who has taken over deletes them
        notes = [self._noted(rank) for rank in range(engine.world_size)]
        snapshots = (self._snapshots or set()) | ({step} if len(self._files) > 1 else set())
        manifest = {
            "format": FORMAT,
            **self._facts,
            "world_size": engine.world_size,
            "zero_stage": engine.stage,
            "identity": self._identity,
            "shapes": engine.shapes,
            "snapshots": sorted(snapshots),
        }
        named = set()
        for i, file in reversed(list(enumerate(self._files))):  # the checkpoint last: it lists the files of the snapshot too
            files = [note for rank in notes for note in rank[i:]]
            key = manifest_of(step, file.name)
            self._store.put(key, checksummed(manifest | {"files": files}))
            named |= {key, *(file["key"] for file in files)}
        self._saved.add(step)
        self._snapshots = snapshots
        try:
            self._delete_old(step, named)
        except StoreError as error:  # the checkpoint exists: what is left over costs room only
            _log.warning("%s; what the run needs no longer is deleted after the next save", error)

    def _delete_old(self, step: int, named: set[str]) -> None:
        """Delete what the run needs no longer up to `step`, whose objects are `named`: what interrupted saves have left behind,
        checkpoints that the training has gone past and not gone on from, and all but the newest ones and those that stay for good.

        Checkpoints of later steps are left as they are, to be looked at, until their step comes.
        """
        every, keep = self._config.keep_every, self._config.keep_checkpoints
        unwanted: list[str] = []
        for kind in (CHECKPOINTS, SNAPSHOTS):
            found = {at: keys for at, keys in contents(self._store, kind).items() if at <= step and self._own(kind, at, keys)}
            past = [at for at, keys in found.items() if manifest_of(at, kind) in keys and (at <= self._start or at in self._saved)]
            if kind == CHECKPOINTS:  # a damaged one takes no good one's place
                past = [at for at in past if at in self._saved or self._states(kind, at) == at]
            regular = [at for at in past if at % self._config.checkpoint_every == 0]  # a run may have to go back to one
            newest = past if kind == SNAPSHOTS else [*sorted(past)[-keep:], *sorted(regular)[-keep:]]
            kept = {*newest, *(at for at in past if every and at % every == 0)} - {step}
            held = named | {key for at in kept for key in found[at] if not _is_note(key)}
            unwanted += [key for keys in found.values() for key in keys if key not in held]
        self._delete(unwanted)

    def _clean_up_at_start(self) -> None:
        """Delete what no manifest names: unfinished saves of any step, and what the last save before may not have come to delete.

        A folder of a later step that holds anything which we do not write is left alone: somebody has put it aside.
        """
        unwanted: list[str] = []
        for kind in (CHECKPOINTS, SNAPSHOTS):
            for at, keys in contents(self._store, kind).items():
                manifest = manifest_of(at, kind)
                if manifest not in keys and (at <= self._start or all(_is_ours(key) for key in keys)):
                    unwanted += keys
                elif manifest in keys and at == self._start and self._states(kind, at) == at:
                    named = read_manifest(self._store, manifest).files
                    unwanted += [key for key in keys if _is_ours(key) and key not in named]
        self._delete(unwanted)

    def _own(self, kind: str, at: int, keys: list[str]) -> bool:
        """Whether the folder of step `at` is this run's, and no copy of another step's that was given its name."""
        return at in self._saved or manifest_of(at, kind) not in keys or self._states(kind, at) in (at, None)

    def _states(self, kind: str, at: int) -> int | None:
        """The step that the manifest in the folder of step `at` states, read once; None where it is damaged or gone."""
        key = manifest_of(at, kind)
        if key not in self._stated:
            try:
                self._stated[key] = stated_step(self._store, key)
            except MissingObject:
                self._stated[key] = None
        return self._stated[key]

    def _noted(self, rank: int) -> list[dict[str, Any]]:
        """What a rank says of its files."""
        key = self._note_key(rank)
        try:
            files: list[dict[str, Any]] = verified(self._store.get(key, JSON_BYTES))["files"]
        except (ValueError, KeyError) as error:
            raise StoreError(f"{self._store.uri}/{key}: is not what rank {rank} wrote ({error}); look at the disk") from error
        return files

    def _delete(self, listed: list[str]) -> None:
        """Delete these objects, manifests first: from there on their checkpoints do not exist."""
        self._check_claim()  # after they were listed: what is written by a training that takes over from here on is not among them
        for key in sorted(listed, key=lambda key: not key.endswith(MANIFEST)):
            self._store.delete(key)

    def _check_claim(self) -> None:
        """Raises CheckpointError if another training has claimed the run."""
        try:
            found = self._store.get(CLAIM, JSON_BYTES)
        except MissingObject:
            return
        if found != self._claim():
            who = visible(found[:200].decode(errors="replace").strip())
            if not re.fullmatch(r"\w+\W+process \d+ on .+", who):
                raise CheckpointError(
                    f"{self._store.uri}/{CLAIM}: is damaged ({who[:40]!r}), so another training may have this run; "
                    f"see that none has and start again"
                )
            raise CheckpointError(
                f"{self._store.uri}: another training ({who}) has taken over this run; stop one of the two, or name another run=URI"
            )

    def _claim(self) -> bytes:
        return f"{self._token}, process {os.getpid()} on {platform.node()}\n".encode()

    def _note_key(self, rank: int) -> str:
        return f"{folder_of(self._pending)}/rank-{rank:05d}-{self._token}.json"

    # --- around the thread ---

    def _run(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as error:  # a thread cannot raise into the training: the next step boundary does
                self.error = error if isinstance(error, UserError) else StoreError(f"{type(error).__name__}: {error}")

        # A daemon: a process that has to end does not wait for a store that does not answer.
        self._thread = threading.Thread(target=guarded, name="freeguide-checkpoint", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _raise_if_any(self) -> None:
        errors: list[UserError | None] = [None] * self._engine.world_size
        dist.all_gather_object(errors, self.error)
        for error in filter(None, errors):
            if isinstance(error, StoreError):
                raise StoreError(f"the checkpoint of step {self._pending} could not be saved: {error}")
            raise error


def _is_note(key: str) -> bool:
    return "/rank-" in key and key.endswith(".json")


def _is_ours(key: str) -> bool:
    """Whether it is the name of a rank's file or note."""
    return re.fullmatch(r"\w+/step-\d+/rank-\d{5}(-[0-9a-f]+)?\.(safetensors|json)", key) is not None
