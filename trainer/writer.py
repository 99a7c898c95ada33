"""Saving checkpoints off the step: the step stands still for one copy into host memory, the rest happens beside the training.

    all ranks         at a step boundary: copy what this rank owns into the bytes of its file              (`Writer.start`)
    a thread each     checksum and upload the file, then a note of what is in it
    all ranks         some steps later the ranks agree that all of them have uploaded                      (`Writer.boundary`)
    rank 0's thread   read the notes and write the manifest, which makes the checkpoint exist; delete older ones

Threads never take part in a collective: two threads that interleave collectives of one group in different orders on two ranks
stop for ever. What the ranks have to agree on travels with the training loop's own exchange (`trainer.failures.Agreement`); the
rest goes through the store. A failed upload is known at the next step boundary, on every rank.
"""

import hashlib
import json
import logging
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import StoreError
from configs.schema import TrainConfig
from data_pipeline.store import Store
from trainer.checkpoint import CHECKPOINTS, FORMAT, SNAPSHOTS, folder_of, manifests
from trainer.ema import Ema
from trainer.engine import KINDS, Engine, Fragment

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

    def note(self, key: str) -> dict[str, Any]:
        """What the manifest has to know: key, size, SHA-256, and [kind, name, offset, numel, begin, crc32] of every tensor."""
        whole = memoryview(self.data)
        pieces = [[*piece, zlib.crc32(whole[piece[4] : piece[4] + 4 * piece[3]])] for piece in self._pieces]
        return {"key": key, "bytes": len(self.data), "sha256": hashlib.sha256(whole).hexdigest(), "pieces": pieces}


class Writer:
    """Writes the checkpoints of a run, and beside them the snapshots of its power-function averages, which are never deleted.

    `error` and `uploaded` (the step whose files of this rank are in the store) are what the ranks agree on.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        ema: Ema,
        identity: dict[str, Any],
        config: TrainConfig,
        before_manifest: Callable[[], object] = lambda: None,  # called by rank 0's thread
    ) -> None:
        self.error = ""
        self.uploaded = 0
        self._store, self._engine, self._identity, self._config = store, engine, identity, config
        self._before_manifest = before_manifest
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

    def start(self, step: int, bad_steps: list[int], undone: int = 0) -> float:
        """Begin the checkpoint of `step`; all ranks call it together. Returns the seconds for which the training stood still.

        `bad_steps` and `undone` are those of `trainer.failures.Incidents`.
        It first waits for the checkpoint before, where that is still on its way. Raises StoreError as `finish` does.
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

        Raises StoreError on every rank where one has.
        """
        if failed:
            self._raise_if_any()
        if self._engine.rank == 0 and self._pending and uploaded == self._pending and not self._publishing:
            self._publishing = True
            self._join()
            self._run(self._publish)

    def finish(self) -> None:
        """Wait until the checkpoint under way exists; all ranks call it together. Raises StoreError on every rank if it cannot."""
        if not self._pending:
            return
        self._join()
        self._raise_if_any()
        if self._engine.rank == 0 and not self._publishing:
            self._run(self._publish)
            self._join()
        self._raise_if_any()
        self._pending, self._publishing = 0, False

    # --- in the thread ---

    def _upload(self) -> None:
        rank, step = self._engine.rank, self._pending
        notes = []
        for file in self._files:
            key = f"{folder_of(step, file.name)}/rank-{rank:05d}.safetensors"
            notes.append(file.note(key))
            self._store.put(key, file.data)  # type: ignore[arg-type]  # a bytearray serves as bytes in every store
        self._store.put(_note_key(step, rank), json.dumps(notes).encode())
        self.uploaded = step

    def _publish(self) -> None:
        engine, step = self._engine, self._pending
        self._before_manifest()
        notes = [json.loads(self._store.get(_note_key(step, rank))) for rank in range(engine.world_size)]
        manifest = {
            "format": FORMAT,
            **self._facts,
            "world_size": engine.world_size,
            "zero_stage": engine.stage,
            "identity": self._identity,
            "shapes": engine.shapes,
        }
        for i, file in reversed(list(enumerate(self._files))):  # the checkpoint last: it lists the files of the snapshot too
            files = [note for rank in notes for note in rank[i:]]
            self._store.put(f"{folder_of(step, file.name)}/manifest.json", json.dumps(manifest | {"files": files}).encode())
        for rank in range(engine.world_size):
            self._store.delete(_note_key(step, rank))
        self._delete_older(step)

    def _delete_older(self, step: int) -> None:
        """Delete all but the newest checkpoints and those that stay for good, and what interrupted saves have left behind."""
        every, keep = self._config.keep_every, self._config.keep_checkpoints
        whole = manifests(self._store)
        regular = [key for key in whole if _step_of(key) % self._config.checkpoint_every == 0]  # a run may have to go back to one
        kept = {*whole[:keep], *regular[:keep], *(key for key in whole if every and _step_of(key) % every == 0)}
        for key in whole:
            if key not in kept:
                self._store.delete(key)  # first the manifest: from here on the checkpoint does not exist
        folders = {key.rsplit("/", 1)[0] for key in kept}
        for info in self._store.list(f"{CHECKPOINTS}/"):
            if info.key.rsplit("/", 1)[0] not in folders and _step_of(info.key) < step:
                self._store.delete(info.key)

    # --- around the thread ---

    def _run(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as error:  # a thread cannot raise into the training: the next step boundary does
                self.error = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"

        # A daemon: a process that has to end does not wait for a store that does not answer.
        self._thread = threading.Thread(target=guarded, name="freeguide-checkpoint", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _raise_if_any(self) -> None:
        errors = [""] * self._engine.world_size
        dist.all_gather_object(errors, self.error)
        if any(errors):
            raise StoreError(f"the checkpoint of step {self._pending} could not be saved: {next(e for e in errors if e)}")


def _note_key(step: int, rank: int) -> str:
    return f"{folder_of(step)}/rank-{rank:05d}.json"


def _step_of(key: str) -> int:
    """The step in "checkpoints/step-00000500/...", or a step that never comes for a name that is not ours."""
    digits = key.split("/")[1].removeprefix("step-")
    return int(digits) if digits.isdecimal() else 2**63
