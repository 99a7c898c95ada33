"""What one can see of a run, given the file of its config: its weights and moments, and the losses that TensorBoard shows."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from freeguide.configs.load import load_config
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.checkpoints import search
from freeguide.trainer.checkpoints.manifest import KINDS
from freeguide.trainer.checkpoints.values import load


def state(config: Path, step: int = 0) -> dict[str, Tensor]:
    """Everything that the checkpoint of `step` holds, 0 = the newest: whole parameters by "kind name"."""
    store = open_store(load_config(config).run)
    found = search.find(store, step)
    return {f"{kind} {n}": v for kind in (*KINDS, *found.averages) for n, v in load(store, found, kind).items()}


def losses(config: Path) -> dict[int, float]:
    """The loss of every step, as TensorBoard shows them: without a hole, and none twice."""
    log = EventAccumulator(str(Path(load_config(config).run) / "events"), size_guidance={"scalars": 0})
    log.Reload()
    seen = log.Scalars("train/loss")
    assert [event.step for event in seen] == [seen[0].step + i for i in range(len(seen))]
    return {event.step: event.value for event in seen}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different[:5]
