"""What one sees of a run: a line of progress, TensorBoard scalars, sample grids.

Losses are gathered over the ranks once per interval, never in a step. Intervals also end at every checkpoint, so a resumed run
writes the very scalars that the undisturbed one would have written. Event files are written to a local folder and copied to
`<run>/events/` by threads, always before a checkpoint exists whose steps they show; after some MiB a new one is begun, so that
little is sent again. Scalars past the step that a run resumes from are purged. TensorBoard reads files in the order of their
names: they are numbered, as clocks jump and differ. All of this is for watching: what fails is a warning, and the training goes on.

MFU is the model's FLOPs (2 per multiply-accumulate; a backward pass counts as two forwards, a recomputed forward not at all) over
what the devices could do in `train.precision`. All ranks move at the pace of the slowest: the time of each rank's own forward
passes tells which.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from freeguide.configs.errors import StoreError
from freeguide.configs.schema import Config
from freeguide.data_pipeline.store.base import Store
from freeguide.trainer.training.devices import peak_flops

BAND_EDGES = (-8.0, -4.0, 0.0, 4.0, 8.0)  # log-SNR; 83 % of the paper's p(lambda) lies in [-4, 4]
BANDS = ("below_-8", "-8_to_-4", "-4_to_0", "0_to_4", "4_to_8", "above_8")
_UPLOAD_SECONDS = 30.0
_FILE_BYTES = 4 * 2**20  # of an event file, before a new one is begun
_log = logging.getLogger("freeguide.telemetry")


@contextmanager
def event_file(store: Store, key: str) -> Iterator[SummaryWriter]:
    """A TensorBoard writer whose events stand at `key` of the store when the block ends. Raises OSError, StoreError."""
    with _LocalFolder() as folder:
        with _writer(str(folder.path)) as writer:
            yield writer
        (path,) = folder.path.iterdir()
        store.put(key, path.read_bytes())


def _writer(folder: str, **options: Any) -> SummaryWriter:
    """What its thread meets, the next write raises: it need not be shown twice, which may be before the thread is in our hands."""
    shown, threading.excepthook = threading.excepthook, lambda _: None
    try:
        writer: Any = SummaryWriter(folder, **options)
        with contextlib.suppress(AttributeError):
            writer.file_writer.event_writer._async_writer._worker._invoke_excepthook = lambda _: None
    finally:
        threading.excepthook = shown
    made: SummaryWriter = writer
    return made


class _LocalFolder:
    """A temporary folder that is gone when it is left; those that killed processes of this user have left go with the next one.

    One is alive as long as somebody holds its lock, which the kernel takes away with the process. Raises OSError.
    """

    _PREFIX = "freeguide-events-"

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        for old in parent.glob(f"{self._PREFIX}*"):
            with contextlib.suppress(OSError):
                if old.lstat().st_uid == os.getuid() and (lock := _locked(old)) >= 0:
                    shutil.rmtree(old, ignore_errors=True)
                    os.close(lock)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=self._PREFIX, dir=parent))
            with contextlib.suppress(FileNotFoundError):
                self._lock = _locked(self.path)
                if self.path.exists():  # nobody has deleted it between its making and its lock
                    return

    def __enter__(self) -> "_LocalFolder":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)


def _locked(folder: Path) -> int:
    """The handle that holds the folder's lock, -1 where another process has it or there are no locks. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return -1
    return handle


def say(line: str) -> None:
    """Print a line of progress, if anybody can still read it: a full disk behind the output, or its end, is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


class Events:
    """TensorBoard's event files of a training that goes on from step `start`. Nothing here raises: what fails is a warning."""

    def __init__(self, store: Store, start: int) -> None:
        self._store, self._token = store, secrets.token_hex(4)  # of two trainings, neither overwrites what the other writes
        self._sent: dict[str, int] = {}  # event files in the store, and how much of them
        self._thread: threading.Thread | None = None
        self._uploading = threading.Lock()
        self._uploaded, self._written = time.perf_counter(), False
        self._folder: _LocalFolder | None = None
        self._writer: SummaryWriter | None = None
        with self._watching():
            self._number = max([_numbered(info.key) for info in store.list("events/")], default=0)
            self._folder = _LocalFolder()
            self._begin(purge_step=start + 1)  # step `start` itself is in the checkpoint

    def write(self, does: Callable[[SummaryWriter], object]) -> None:
        if self._writer is not None:
            with self._watching():
                does(self._writer)
                self._written = True

    def flush(self) -> None:
        """To the files that `upload` sends."""
        self.write(lambda writer: writer.flush())

    def upload(self) -> None:
        """Copy the files that have grown; any thread may call it, and waits for another that does."""
        with self._uploading:
            if self._folder is None or not self._written:
                return
            try:
                for path in sorted(self._folder.path.glob("*/*")):
                    if path.stat().st_size > self._sent.get(path.parent.name, 0):
                        data = path.read_bytes()
                        self._store.put(f"events/events.out.tfevents.{path.parent.name}.{self._token}", data)
                        self._sent[path.parent.name] = len(data)
            except (StoreError, OSError) as error:  # the next upload brings them
                _log.warning("%s; TensorBoard scalars follow later", error)

    def upload_now_and_then(self) -> None:
        """In a thread: all ranks would wait for a store that is slow or gone. One at a time."""
        if time.perf_counter() - self._uploaded <= _UPLOAD_SECONDS or (self._thread is not None and self._thread.is_alive()):
            return
        self.flush()
        self._uploaded = time.perf_counter()
        self.write(self._begin_another)
        self._thread = threading.Thread(target=self.upload, name="freeguide-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._writer is not None:
            with self._watching():
                self._writer.close()
        if self._thread is not None:
            self._thread.join()
        self.upload()
        with self._uploading:
            if self._folder is not None:
                self._folder.__exit__()
            self._folder = None

    def _begin(self, purge_step: int | None = None) -> None:
        assert self._folder is not None
        self._number += 1
        self._writer = _writer(f"{self._folder.path}/{self._number:010d}", purge_step=purge_step)

    def _begin_another(self, writer: SummaryWriter) -> None:
        if sum(path.stat().st_size for path in Path(writer.log_dir).iterdir()) > _FILE_BYTES:
            writer.close()
            self._begin()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorBoard raises whatever its thread has met: a full disk, a folder that is gone
            self._writer = None
            _log.warning("%s; the training goes on without TensorBoard until its next start", error)


def _numbered(key: str) -> int:
    """The number in the name of a training's event file; older versions took the clock's seconds."""
    found = re.fullmatch(r"events/events\.out\.tfevents\.(\d+)\..*", key)
    return int(found[1]) if found else 0


class Stopwatch:
    """Seconds of this rank's work inside `with`. On a GPU they are GPU seconds: events that only `take` waits for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def _mark(self) -> None:
        mark: Any = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append(mark)

    def __enter__(self) -> "Stopwatch":
        self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        self._mark()

    def take(self) -> float:
        """The seconds since the last `take`."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks = []
        if not self._cuda:
            return float(sum(end - begin for begin, end in pairs))
        if pairs:
            pairs[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1000


@dataclass(frozen=True)
class Interval:
    """Steps first, first + 1, ...: global mean losses and gradient norms, and this rank's (losses (b,), indices (b,))."""

    first: int
    losses: list[float]
    norms: list[float]
    own: list[tuple[Tensor, Tensor]]


class Telemetry:
    """Collects every step on every rank; rank 0 prints and writes. `flops_per_image` is the forward cost, 2 per MAC."""

    def __init__(self, config: Config, store: Store, device: torch.device, start: int, flops_per_image: int) -> None:
        self._config, self._store, self._device = config, store, device
        self._peak, self._flops = (
            peak_flops(device, config.train.precision),
            3 * flops_per_image,
        )  # a backward pass costs two forwards
        self._edges = torch.tensor(BAND_EDGES, device=device)
        self._events = Events(store, start) if dist.get_rank() == 0 else None
        self._mark = time.perf_counter()
        self._steps, self._began = 0, self._mark  # steps since the first one, which ended then: start-up says nothing of the rest
        self._first = True
        self.forward = Stopwatch(device)  # around the forward passes of this rank
        self._stall: float | None = None  # seconds, of the checkpoint begun in this interval
        self._forget()

    def record(self, losses: Tensor, logsnr: Tensor, index: Tensor, grad_norm: Tensor, lr: float, waited: float) -> None:
        """One optimizer step of this rank: per-example losses, log-SNRs and indices (b,), and the seconds it waited for data."""
        if self._first:
            self._first, self._began = False, time.perf_counter()
        else:
            self._steps += 1
        self._own.append((losses, index))
        bands = torch.bucketize(logsnr, self._edges)
        losses = losses.double()
        self._losses.append(losses.sum())
        self._bands[0].index_add_(0, bands, losses)
        self._bands[1].index_add_(0, bands, torch.ones_like(losses))
        self._norms.append(grad_norm)
        self._lrs.append(lr)
        self._waited += waited

    def flush(self, step: int, reading: dict[str, Any]) -> Interval:
        """End an interval after `step` steps: reduce over the ranks, print the line, write the scalars.

        `reading` are the figures of this rank's reader (`Reader.stats`); those of rank 0 are shown.
        """
        count, rank = len(self._losses), dist.get_rank()
        ranks = torch.zeros(2, dist.get_world_size(), dtype=torch.float64, device=self._device)
        ranks[0, rank], ranks[1, rank] = self._waited, self.forward.take()
        sums = torch.cat([torch.stack(self._losses), self._bands.flatten(), ranks.flatten()])
        dist.all_reduce(sums)
        sums = sums.cpu()
        losses, bands, ranks = sums.split([count, self._bands.numel(), ranks.numel()])
        losses = losses / self._config.train.global_batch
        interval = Interval(step - count, losses.tolist(), torch.stack(self._norms).tolist(), self._own)
        if self._events is not None:
            self._write(self._events, step, interval, bands.view(2, -1), ranks.view(2, -1), reading)
        self._forget()
        self._stall = None
        self._mark = time.perf_counter()
        return interval

    def saved(self, step: int, stall: float) -> None:
        """A checkpoint of `step` has begun, for which the training stood still for `stall` seconds."""
        self._stall = stall
        if self._events is not None:
            self._events.write(lambda writer: writer.add_scalar("checkpoint/stall_ms", 1000 * stall, step))
            self._events.flush()  # before the checkpoint exists

    def images(self, step: int, tag: str, grid: Tensor) -> None:
        """A picture (C, H, W) in [0, 1] for TensorBoard."""
        if self._events is not None:
            self._events.write(lambda writer: writer.add_image(tag, grid, step))

    def upload(self) -> None:
        """Copy the event files of rank 0 that have grown to the store; any thread may call it."""
        if self._events is not None:
            self._events.upload()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _forget(self) -> None:
        self._losses: list[Tensor] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        self._norms: list[Tensor] = []
        self._lrs: list[float] = []
        self._bands = torch.zeros(2, len(BANDS), dtype=torch.float64, device=self._device)
        self._waited = 0.0

    def _write(self, events: Events, step: int, interval: Interval, bands: Tensor, ranks: Tensor, reading: dict[str, Any]) -> None:
        """`bands` (2, BANDS) are sums of losses and counts by log-SNR, `ranks` (2, R) seconds waited for data and in forwards."""
        train, world_size, count = self._config.train, dist.get_world_size(), len(interval.losses)
        now = time.perf_counter()
        seconds = max(now - self._mark, 1e-9)
        images_per_second = count * train.global_batch / seconds
        wait = 100.0 * float(ranks[0].mean()) / seconds
        mfu = None if self._peak is None else 100.0 * images_per_second * self._flops / (self._peak * world_size)
        slowest = int(ranks[1].argmax())
        behind = 100.0 * (float(ranks[1].max() / ranks[1].mean().clamp(min=1e-9)) - 1)
        speed = {
            "images_per_second": images_per_second,
            "data_wait_percent": wait,
            "mfu_percent": mfu,
            "forward_ms_fastest": 1000 * float(ranks[1].min()) / count,
            "forward_ms_slowest": 1000 * float(ranks[1].max()) / count,
            "slowest_rank": slowest,
        }

        def scalars(writer: SummaryWriter) -> None:
            for i in range(count):
                at = interval.first + i + 1
                writer.add_scalar("train/loss", interval.losses[i], at)
                writer.add_scalar("train/gradient_norm", interval.norms[i], at)
                writer.add_scalar("train/lr", self._lrs[i], at)
            for name, loss, number in zip(BANDS, *bands, strict=True):
                if number:
                    writer.add_scalar(f"loss_by_logsnr/{name}", float(loss / number), step)
            if world_size > 1:
                writer.add_histogram("ranks/data_wait_percent", 100.0 * ranks[0] / seconds, step)
                writer.add_histogram("ranks/forward_ms", 1000 * ranks[1] / count, step)
            for name, value in speed.items():
                if value is not None:
                    writer.add_scalar(f"speed/{name}", value, step)
            for name, value in reading.items():
                for cause, count_of in value.items() if isinstance(value, dict) else [("", value)]:
                    writer.add_scalar(f"data/{name}/{cause}".rstrip("/"), count_of, step)

        events.write(scalars)
        retries, bad = (sum(reading[name].values()) for name in ("retries", "bad_samples"))
        per_step = (now - self._began) / self._steps if self._steps else seconds / count
        parts = [
            f"step {step}/{train.steps}",
            f"loss {sum(interval.losses) / count:.4f}",
            f"grad {interval.norms[-1]:.3f}",
            f"lr {self._lrs[-1]:.2e}",
            f"{images_per_second:,.0f} images/s",
            *([f"mfu {mfu:.1f} %"] if mfu is not None else []),
            f"data wait {wait:.1f} %",
            *([f"{retries} retries"] if retries else []),
            *([f"{bad} bad samples"] if bad else []),
            *([f"slowest rank {slowest} +{behind:.0f} %"] if world_size > 1 else []),
            *([f"save stall {1000 * self._stall:.0f} ms"] if self._stall is not None else []),
            f"eta {timedelta(seconds=round(per_step * (train.steps - step)))}",
        ]
        say("  ".join(parts))
        events.upload_now_and_then()
