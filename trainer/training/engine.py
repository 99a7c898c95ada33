"""DeepSpeed ZeRO behind the four things that the training loop needs: forward, accumulate, step, and the fp32 state it owns.

ZeRO splits the fp32 state over the ranks in a way that depends on its stage. `Fragment` says the same thing for every stage:
"these values of this parameter, flattened, are mine". The moving average (`trainer.training.ema`) and the checkpoints
(`trainer.checkpoints`) are written in fragments only, so neither knows of stages.
"""

import logging
import math
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import TrainConfig
from freeguide.trainer.checkpoints.manifest import KINDS
from freeguide.trainer.checks import share_checks

_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler
_BUCKET = 500_000_000  # values that DeepSpeed reduces at once; it makes room for so many, however small the network
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # processes that srun or mpirun has started
_OURS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "data_types",
}


@dataclass(frozen=True)
class Fragment:
    """Values [offset, offset + numel) of the flattened parameter `name`, kept at [start, start + numel) of `flat`."""

    name: str
    offset: int
    numel: int
    flat: nn.Parameter  # the fp32 tensor that the optimizer updates
    start: int

    def slice(self, begin: int, end: int) -> "Fragment":
        """The part of this fragment that covers values [begin, end) of the parameter."""
        return Fragment(self.name, begin, end - begin, self.flat, self.start + begin - self.offset)


def local_device() -> torch.device:
    """The accelerator of this process: GPU number LOCAL_RANK, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def join_process_group(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group that torchrun or Ray describes in the environment, or make a group of one.

    Raises ConfigError where a launcher has started several processes and told them nothing of each other.
    """
    if dist.is_initialized():
        return
    for name in _TASKS if "RANK" not in os.environ else ():
        if int(os.environ.get(name, "1")) > 1:
            raise ConfigError(
                f"{name}={os.environ[name]} processes have been started and none knows its rank, so each would train alone; "
                f"start one torchrun per node, which starts the ranks"
            )
    for name, alone in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, alone)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)


class Engine:
    """A network under DeepSpeed ZeRO with torch's AdamW. Needs the process group of `join_process_group`.

    Raises ConfigError for a global batch that the processes of the group cannot share.
    """

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # `trainer.checks.contradictions` asked the same of cluster.workers. How many processes there are is known only here.
        for holds, sentence in share_checks(config, self.world_size, "WORLD_SIZE"):
            if not holds:
                raise ConfigError(sentence)
        deepspeed = _import_deepspeed()
        self.device = local_device()
        self.micro_batch = config.micro_batch or config.global_batch // self.world_size
        self.accumulation = config.global_batch // (self.world_size * self.micro_batch)
        self.stage = config.zero_stage
        self.shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        numel = sum(map(math.prod, self.shapes.values()))
        _check_device(config, self.device)
        network = network.to(self.device)
        network.recompute = config.recompute  # type: ignore[assignment]  # an attribute of every network here
        parameters = [p for p in network.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(
            parameters,
            lr=0.0,
            betas=(config.betas[0], config.betas[1]),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=network,
            optimizer=adamw,
            config=_deepspeed_config(config, self.micro_batch, self.accumulation, self.world_size, numel),
            dist_init_required=False,
        )
        self._adamw: torch.optim.Optimizer = adamw if self.stage == 0 else self._optimizer.optimizer
        self._create_moments()
        self.fragments = self._held()
        if config.compile:
            self._engine.compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._engine(*args, **kwargs)

    @property
    def network(self) -> nn.Module:
        return self._engine.module

    def accumulate(self, loss: Tensor) -> None:
        """Back-propagate the mean loss of one micro-batch. Gradients are averaged over micro-batches and ranks."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; no weight moves

    def step(self, lr: float) -> Tensor:
        """Clip, move the weights with learning rate `lr`, and return the global gradient norm before clipping.

        Gradients that are not finite on any rank move nothing, neither weights nor moments nor AdamW's count; the norm tells.
        Raises OverflowError on every rank where gradients are not finite in fp16 even at the smallest loss scale.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr
        norm = None
        if self.stage == 0:
            norm = self._gradient_norm()
            # ZeRO skips such a step by itself. Here the fused AdamW does it on the device, where the norm is.
            self._adamw.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):  # DeepSpeed has no class for it
                raise OverflowError from error
            raise
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def owned(self) -> list[Fragment]:
        """A disjoint cover of all parameters over all ranks: what this rank averages and saves."""
        if self.stage > 0:
            return self.fragments
        rank, world = self.rank, self.world_size
        shares = [f.slice(f.numel * rank // world, f.numel * (rank + 1) // world) for f in self.fragments]
        return [share for share in shares if share.numel]

    def values(self, fragment: Fragment, kind: str) -> Tensor:
        """The live fp32 values of a fragment: its "master" weights or an AdamW moment. Shape (numel,)."""
        state = fragment.flat if kind == "master" else self._adamw.state[fragment.flat][kind]
        return state.detach().view(-1).narrow(0, fragment.start, fragment.numel)

    def counters(self) -> dict[str, Any]:
        """What else decides the next update: AdamW's count of updates (its bias correction), and the state of fp16's loss scale."""
        scaler = getattr(self._optimizer, "loss_scaler", None)
        scale = {name: getattr(scaler, name) for name in _LOSS_SCALE} if getattr(scaler, "dynamic", False) else {}
        return {"adam_steps": int(next(iter(self._adamw.state.values()))["step"]), "loss_scale": scale}

    def loaded(self, adam_steps: int, loss_scale: dict[str, float]) -> None:
        """Take over fp32 values that were written through `values`: set the counters and refresh the working weights."""
        for state in self._adamw.state.values():
            state["step"].fill_(float(adam_steps))
        for name, value in loss_scale.items() if self.counters()["loss_scale"] else ():
            setattr(self._optimizer.loss_scaler, name, value)
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer._partition_all_parameters()  # what stands gathered since the last step is not gathered again
            if self._optimizer.persistent_parameters:
                self._optimizer.persistent_parameters[0].all_gather(self._optimizer.persistent_parameters)

    def _create_moments(self) -> None:
        # AdamW makes its state at the first step; a resumed run has to fill it before that.
        if self.stage == 3:
            flats = list(self._optimizer.fp32_partitioned_groups_flat)
        else:
            flats = [flat for group in self._adamw.param_groups for flat in group["params"]]
        for flat in flats:
            zeros = {kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in KINDS[1:]}
            self._adamw.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **zeros}

    def _held(self) -> list[Fragment]:
        found = []
        parameters: list[tuple[str, Any]] = list(self.network.named_parameters())  # DeepSpeed hangs attributes on them
        for name, p in parameters:
            if not p.requires_grad:
                continue
            if self.stage == 0:
                found.append(Fragment(name, 0, p.numel(), p, 0))
            elif self.stage == 3:
                group, start, partition = self._optimizer.grad_position[self._optimizer.get_param_id(p)]
                numel = min(max(p.ds_numel - self.rank * partition, 0), partition)  # the last partition is padded
                if numel:
                    found.append(
                        Fragment(name, self.rank * partition, numel, self._optimizer.fp32_partitioned_groups_flat[group], start)
                    )
            elif p._hp_mapping is not None:
                mapping = p._hp_mapping
                flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Fragment(name, low.start, low.numel, flat, high.start))
        return found

    def _gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])


def _check_device(config: TrainConfig, device: torch.device) -> None:
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision=fp16 needs a GPU, and there is none here; use bf16 or fp32")


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        if not torch.cuda.is_available():  # asking for the table makes DeepSpeed try all its operations on a GPU
            from deepspeed.ops import __compatible_ops__

            # An inference operation for CPUs that would be compiled, for half a minute, at the first start.
            __compatible_ops__["deepspeed_shm_comm"] = False

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _deepspeed_config(config: TrainConfig, micro_batch: int, accumulation: int, world_size: int, numel: int) -> dict[str, Any]:
    theirs = config.deepspeed.get("zero_optimization", {})
    refused = sorted(_OURS & set(config.deepspeed)) + (["zero_optimization.stage"] if "stage" in theirs else [])
    if refused:
        raise ConfigError(f"train.deepspeed.{refused[0]} is set from the options of `train`; remove it from the deepspeed section")
    zero = {
        "stage": config.zero_stage,
        "reduce_bucket_size": min(_BUCKET, numel),
        # Stage 1 reduces when the backward pass is over. A copy of each gradient into a buffer would only cost time there.
        "contiguous_gradients": config.zero_stage != 1 or bool(theirs.get("overlap_comm")),
    }
    ours: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {**zero, **theirs},
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},  # DeepSpeed's dynamic loss scale, from 2^16
        "steps_per_print": 2**31 - 1,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice in every micro-batch
    }
    if config.precision != "fp32" and accumulation > 1:
        ours["data_types"] = {"grad_accum_dtype": "fp32"}  # micro-batches must not be rounded to 8 or 11 bits as they add up
    return {**config.deepspeed, **ours}
