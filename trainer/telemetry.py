"""What one sees of a run: a line of progress, TensorBoard scalars, sample grids.

Losses are gathered over the ranks once per interval, never in a step. Intervals also end at every checkpoint, so a resumed run
writes the very scalars that the undisturbed one would have written. Event files are written to a local folder and copied to
`<run>/events/`; scalars past the step that a run resumes from are purged.
"""

import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from configs.schema import Config
from data_pipeline.store import Store

BAND_EDGES = (-8.0, -4.0, 0.0, 4.0, 8.0)  # log-SNR; 83 % of the paper's p(lambda) lies in [-4, 4]
BANDS = ("below_-8", "-8_to_-4", "-4_to_0", "0_to_4", "4_to_8", "above_8")
_UPLOAD_SECONDS = 30.0
_PEAK_FLOPS = {  # dense bf16, by the maker's data sheet
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its maker's data sheet, or None where we know of none (a CPU)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


class Telemetry:
    """Collects every step on every rank; rank 0 prints and writes. `flops_per_image` is the forward cost, 2 per MAC."""

    def __init__(self, config: Config, store: Store, device: torch.device, start: int, flops_per_image: int) -> None:
        self._config, self._store, self._device = config, store, device
        self._peak, self._flops = peak_flops(device), 3 * flops_per_image  # a backward pass costs two forwards
        self._edges = torch.tensor(BAND_EDGES, device=device)
        self._writer: SummaryWriter | None = None
        if dist.get_rank() == 0:
            self._folder = tempfile.TemporaryDirectory(prefix="freeguide-events-")
            self._writer = SummaryWriter(self._folder.name, purge_step=start or None)
        self._began = self._mark = time.perf_counter()
        self._uploaded, self._first, self._start = self._began, start, start
        self._forget()

    def record(self, step: int, losses: Tensor, logsnr: Tensor, grad_norm: Tensor, lr: float, waited: float) -> None:
        """One optimizer step of this rank: per-example losses and log-SNRs (b,), and the seconds spent waiting for data."""
        bands = torch.bucketize(logsnr, self._edges)
        losses = losses.double()
        self._losses.append(losses.sum())
        self._bands[0].index_add_(0, bands, losses)
        self._bands[1].index_add_(0, bands, torch.ones_like(losses))
        self._norms.append(grad_norm)
        self._lrs.append(lr)
        self._waited += waited

    def flush(self, step: int) -> None:
        """End an interval after `step` steps: reduce over the ranks, print the line, write the scalars."""
        count = len(self._losses)
        if not count:
            return
        waited = torch.tensor([self._waited], dtype=torch.float64, device=self._device)
        sums = torch.cat([torch.stack(self._losses), self._bands.flatten(), waited])
        dist.all_reduce(sums)
        if self._writer is not None:
            self._write(step, count, sums.cpu(), torch.stack(self._norms).cpu())
        self._forget()
        self._mark, self._start = time.perf_counter(), step

    def images(self, step: int, tag: str, grid: Tensor) -> None:
        """A picture (C, H, W) in [0, 1] for TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(tag, grid, step)

    def close(self) -> None:
        if self._writer is not None:
            self._upload()
            self._writer.close()
            self._folder.cleanup()

    def _forget(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._lrs: list[float] = []
        self._bands = torch.zeros(2, len(BANDS), dtype=torch.float64, device=self._device)
        self._waited = 0.0

    def _write(self, step: int, count: int, sums: Tensor, norms: Tensor) -> None:
        assert self._writer is not None
        train, world_size = self._config.train, dist.get_world_size()
        losses = sums[:count] / train.global_batch
        band_losses, band_counts = sums[count:-1].view(2, -1)
        seconds = max(time.perf_counter() - self._mark, 1e-9)
        images_per_second = count * train.global_batch / seconds
        wait = 100.0 * float(sums[-1]) / world_size / seconds
        mfu = None if self._peak is None else 100.0 * images_per_second * self._flops / (self._peak * world_size)
        for i in range(count):
            at = step - count + i + 1
            self._writer.add_scalar("train/loss", float(losses[i]), at)
            self._writer.add_scalar("train/gradient_norm", float(norms[i]), at)
            self._writer.add_scalar("train/lr", self._lrs[i], at)
        for name, loss, number in zip(BANDS, band_losses, band_counts, strict=True):
            if number:
                self._writer.add_scalar(f"loss_by_logsnr/{name}", float(loss / number), step)
        self._writer.add_scalar("speed/images_per_second", images_per_second, step)
        self._writer.add_scalar("speed/data_wait_percent", wait, step)
        if mfu is not None:
            self._writer.add_scalar("speed/mfu_percent", mfu, step)
        elapsed, done = time.perf_counter() - self._began, step - self._first
        eta = timedelta(seconds=round(elapsed / done * (train.steps - step)))
        print(
            f"step {step}/{train.steps}  loss {float(losses.mean()):.4f}  grad {float(norms[-1]):.3f}  lr {self._lrs[-1]:.2e}  "
            f"{images_per_second:,.0f} images/s  {'' if mfu is None else f'mfu {mfu:.1f} %  '}data wait {wait:.1f} %  eta {eta}",
            flush=True,
        )
        if time.perf_counter() - self._uploaded > _UPLOAD_SECONDS:
            self._upload()

    def _upload(self) -> None:
        assert self._writer is not None
        self._writer.flush()
        for path in sorted(Path(self._folder.name).iterdir()):
            self._store.put(f"events/{path.name}", path.read_bytes())
        self._uploaded = time.perf_counter()
