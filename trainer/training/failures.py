"""What can go wrong in a long training, and what is done about it.

    a worker hangs          `Watchdog` ends it, `limit_collectives` ends those that wait for it; the launcher restarts the group
    a wish to end           `Terminated` remembers it (SIGTERM); all ranks save at the same step boundary and leave with code 143
    a rank cannot save      all ranks stop at the next step boundary, with its reason
    gradients not finite    the engine moves nothing; `Incidents` records the samples; over the budget, all steps since the last
                            good checkpoint become steps that moved nothing, once in a run; the next time the run ends
    the loss jumps          `Incidents` records the samples

Ranks must take such decisions at the same step, or they wait for each other for ever. `Agreement` gives them the maximum over
the ranks of a few numbers, every step and without waiting: it is begun at one step and read at the next.
"""

import json
import logging
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from freeguide.configs.errors import DataError, StoreError, UserError
from freeguide.configs.schema import TrainConfig
from freeguide.configs.untrusted import JSON_BYTES, parse_json
from freeguide.data_pipeline.order import AnyOrder
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.trainer.training.telemetry import Interval

HUNG = 86  # exit code of a worker that its watchdog has ended
TERMINATED = 128 + signal.SIGTERM  # exit code after SIGTERM: every scheduler knows that the work is not done
SPIKE = 3.0  # a loss of so many times the median of the steps before it is recorded
WINDOW = 100  # steps of that median
_WORST = 8  # samples of each rank that are recorded
_log = logging.getLogger("freeguide.failures")


class Agreement:
    """The maximum over the ranks of a few whole numbers, a step late. All ranks call `exchange` once a step, and `close`."""

    def __init__(self, count: int) -> None:
        self._group = dist.new_group(backend="gloo")  # its own: it never meets the collectives of the training
        self._values = torch.zeros(count, dtype=torch.int64)
        self._work: Any = None

    def exchange(self, *values: int) -> list[int]:
        """Begin the exchange of this step's `values`; returns the maxima of the step before, and 0s at first."""
        if self._work is not None:
            self._work.wait()
        agreed: list[int] = self._values.tolist()
        self._values = torch.tensor(values, dtype=torch.int64)
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        if self._work is not None:
            self._work.wait()
        dist.destroy_process_group(self._group)


class Terminated:
    """Remembers that this process has been asked to end: by SIGTERM while it is entered in the main thread, or by `ask`.

    `tell` is called at every request, where the request happens; in a signal handler it may raise.
    """

    def __init__(self, tell: Callable[[], object] = lambda: None) -> None:
        self.asked = False
        self._tell = tell
        self._before: Any = None

    def __enter__(self) -> "Terminated":
        if threading.current_thread() is threading.main_thread():
            self._before = self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        self._before = None

    @property
    def heard(self) -> bool:
        """Whether a request is heard at the next step: it is entered."""
        return self._before is not None

    def listen(self) -> Any:
        """Hear SIGTERM from now on; returns the handler before. Only a process's main thread may call it."""
        return signal.signal(signal.SIGTERM, lambda *_: self.ask())

    def ask(self) -> None:
        self.asked = True
        self._tell()


class Watchdog:
    """Ends the process where it makes no progress for `seconds`, 0 = never. It watches from the first `progress` on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: tuple[float, str] | None = None
        self._closed = threading.Event()
        self._watched = threading.get_ident()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, name="freeguide-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def progress(self, done: str) -> None:
        """Say what has just been done."""
        self._last = (time.monotonic(), done)

    def _watch(self) -> None:
        while not self._closed.wait(self._seconds / 10):
            if self._last is not None and time.monotonic() - self._last[0] > self._seconds:
                frame = sys._current_frames().get(self._watched)
                place = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "an unknown place"
                rank = os.environ.get("RANK", "0")
                line = f"freeguide: rank {rank}: no progress for {self._seconds:g} s after {self._last[1]}, in {place}; ending it\n"
                os.write(2, line.encode())
                os._exit(HUNG)  # nothing gentler ends a process whose threads hang


def limit_collectives(seconds: float) -> None:
    """Let no collective of any process group wait for longer than `seconds`, 0 = as before.

    Groups start with half an hour, as the first step may compile; DeepSpeed makes groups of its own with the backend's default.
    """
    if seconds:
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class Incidents:
    """Steps that went wrong, with their samples, as JSON lines in `<run>/incidents.jsonl`.

    `bad_steps` are those so far whose gradients were not finite, `undone` is the last of the steps that were undone (0: none).
    Both are part of the checkpoint, so a restart does not reset them. The budget counts the bad steps after `undone`.
    """

    def __init__(self, store: Store, order: AnyOrder, bad_steps: list[int], train: TrainConfig, undone: int = 0) -> None:
        self.bad_steps, self.undone = list(bad_steps), undone
        self._store, self._order, self._budget = store, order, train.bad_steps
        self._scaled = train.precision == "fp16"  # a gradient that overflows is how the loss scale is found, not an incident
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def review(self, interval: Interval) -> None:
        """Record what went wrong in the steps of an interval; every rank calls it."""
        rows, first = [], interval.first
        for i, (loss, norm) in enumerate(zip(interval.losses, interval.norms, strict=True)):
            finite = math.isfinite(loss) and (self._scaled or math.isfinite(norm))
            median = statistics.median(self._recent) if len(self._recent) >= WINDOW // 5 else float("inf")
            if not finite:
                self.bad_steps.append(first + i + 1)
            else:
                self._recent.append(loss)
            if not finite or loss > SPIKE * median:
                what = "spike" if finite else "not finite"
                rows.append({"step": first + i + 1, "what": what, "loss": loss, "gradient_norm": norm, "median": median})
                rows[-1]["samples"] = self._worst(*interval.own[i])
        self._record(rows)

    def over_budget(self) -> int:
        """0, or over the budget of steps that are not finite the first of the last unbroken row of them.

        The weights of a checkpoint before it are good. Raises UserError where the run has been there before: going back did not
        help. Every rank calls it, at the same steps in every run of the same config.
        """
        if sum(step > self.undone for step in self.bad_steps) <= self._budget:
            return 0
        if self.undone:
            raise self.hopeless(f"although the steps up to {self.undone} had been undone")
        return self._last_row()

    def _last_row(self) -> int:
        begin, bad = self.bad_steps[-1], set(self.bad_steps)
        while begin - 1 in bad:
            begin -= 1
        return begin

    def undo(self, good: int, step: int) -> None:
        """Note that the updates after step `good`, up to `step`, have been undone. Every rank calls it."""
        self.undone = step
        self._record([{"step": step, "what": "undone", "back_to": good}])

    def hopeless(self, why: str) -> UserError:
        """The sentence of a run that is over its budget and cannot go back."""
        bad = [step for step in self.bad_steps if step > self.undone]
        return UserError(
            f"the gradients of {len(bad)} steps were not finite (the last of them {bad[-1]}), more than "
            f"train.bad_steps={self._budget}, {why}; {self._store.uri}/incidents.jsonl names the samples: move the checkpoints "
            f"from step {self._last_row()} on out of checkpoints/ and lower train.lr, or raise train.bad_steps; "
            f"mended data need another run=URI"
        )

    def _worst(self, losses: Tensor, index: Tensor) -> list[dict[str, Any]]:
        """The samples with the largest losses of a step, over all ranks, largest first; what is not finite comes first of all."""
        weight = torch.nan_to_num(losses.float(), nan=float("inf"))
        chosen = weight.topk(min(_WORST, len(weight))).indices
        mine = [(float(losses[i]), int(index[i])) for i in chosen.tolist()]
        ranks: list[list[tuple[float, int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, mine)
        every = sorted((row for rank in ranks for row in rank), key=lambda row: (row[0] == row[0], -row[0], row[1]))
        samples = self._order.locate(np.array([at for _, at in every[:_WORST]]))[1].tolist()
        return [{"index": at, "sample": id_, "loss": loss} for (loss, at), id_ in zip(every, samples, strict=False)]

    def _record(self, rows: list[dict[str, Any]]) -> None:
        """Rank 0 writes; what a resumed run does again replaces what was written."""
        if not rows or dist.get_rank() > 0:
            return
        try:
            try:
                before = self._store.get("incidents.jsonl", JSON_BYTES).decode(errors="replace").splitlines()
            except MissingObject:
                before = []
            again = {(row["step"], "back_to" in row) for row in rows}
            kept = [line for line in before if _about(line) not in again] + [json.dumps(_plain(row)) for row in rows]
            self._store.put("incidents.jsonl", "".join(f"{line}\n" for line in kept).encode())
        except (StoreError, DataError) as error:  # a diary is not worth a run
            _log.warning("%s; incidents of step %s are not recorded", error, rows[0]["step"])
        for row in rows:
            if "back_to" in row:
                _log.warning("step %d: over train.bad_steps; the updates after step %d are undone", row["step"], row["back_to"])
            else:
                text = "step %d: %s, loss %.4g, gradient norm %.4g"
                _log.warning(text, row["step"], row["what"], row["loss"], row["gradient_norm"])


def _about(line: str) -> tuple[int, bool] | None:
    """Step and kind of a line of the diary; None for one that is damaged, or that we did not write: it stays as it is."""
    try:
        row = parse_json(line)
        return (row["step"], "back_to" in row)
    except (ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become texts."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value
