"""Every option of freeguide: its type, its unit, its default, and one line of why.

A YAML file and `key=value` overrides are merged onto `Config` by `configs.load`. Options are grouped by the room that reads
them. Locations are URIs: `s3://bucket/prefix` or a folder; `load` makes them absolute, so that a config means the same places on
every machine and in every process. Defaults are the paper's (arXiv 2207.12598) where it states them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

LOCATION = "location"
Uri = Annotated[str, LOCATION]  # marks the texts that name a place


@dataclass
class DataConfig:
    uri: Uri = MISSING  # where the shards and their manifest stand
    source: str = "folder"  # what `prepare` reads: digits (scikit-learn's) | folder (class/name.png) | idx | parquet | webdataset
    path: Uri = ""  # the folder of class folders, IDX or Parquet files; the URI of tars that `index` has been run on
    mixture: dict[Uri, int] = field(default_factory=dict)  # `index` joins these data sets, {URI: whole weight}, into one at `uri`
    shards: str = ""  # what `index` reads: tars under `uri` in brace notation, a-{000..099}.tar; empty = all of them
    skip_broken: bool = False  # whether `index` leaves out broken tars instead of stopping
    image_size: int = 64  # pixels per side; other images are centre-cropped and resized
    resize: str = (
        "adm"  # how `prepare` resizes: adm (box halvings, bicubic) | area (each pixel the mean of what it covers) | box (Pillow's)
    )
    channels: int = 3  # 1 = grey, 3 = RGB; latents have any number
    dtype: str = "uint8"  # what a sample is: uint8 (an image) | float16 | float32 (raw latents, .npy arrays (C, H, W))
    latent_scale: float = 1.0  # latents are multiplied by it when they are read; Stable Diffusion's autoencoder wants 0.18215
    classes: int = 1000  # number of classes; labels are 0 .. classes - 1
    flip: bool = True  # random horizontal flip, drawn by global sample index
    shard_samples: int = 4096  # samples per shard that `prepare` writes
    bad_images: float = 0.0  # share of the source images that may be unreadable and left out before `prepare` stops
    bad_samples: float = 0.0  # share of the training samples that may be unreadable and replaced before training stops
    fetch_threads: int = 4  # concurrent ranged GETs of one worker
    decode_threads: int = 2  # threads of one worker that turn bytes into pixels
    prefetch_batches: int = 4  # batches held ready ahead of the training step
    cache_mib: int = 512  # MiB of undecoded windows that one worker may hold in memory
    disk_cache: Uri = ""  # folder on each node's own disk for what was read from the store; empty = none
    disk_cache_gib: float = 100.0  # GiB that this folder may hold; what was read longest ago goes first


@dataclass
class ModelConfig:
    """The ADM U-Net (Dhariwal & Nichol 2021) or a DiT (Peebles & Xie 2023). Defaults: the network of the paper's 64x64 models.

    A DiT reads network, channels, heads, depth, patch and learn_sigma; it has no dropout.
    """

    network: str = "adm"  # adm | dit
    channels: int = 192  # adm: width of the first level; dit: width of a token
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 3, 4])  # width of each level, in units of `channels`
    res_blocks: int = 3  # residual blocks per level
    attention: list[int] = field(default_factory=lambda: [32, 16, 8])  # feature-map sizes (pixels) that get self-attention
    heads: int = 4  # adm: attention heads where head_channels is 0; dit: attention heads
    head_channels: int = 64  # channels per attention head; 0 = use `heads`
    resblock_updown: bool = True  # change resolution inside residual blocks (BigGAN's way) instead of by strided convolution
    scale_shift_norm: bool = True  # condition by scale and shift of the group norm (adaptive group norm)
    dropout: float = 0.1  # dropped activations in residual blocks; masks are drawn by global sample index
    learn_sigma: bool = False  # ADM's second set of output channels; the paper fixes the variance with v, so off
    depth: int = 28  # dit: transformer blocks
    patch: int = 2  # dit: pixels per side of a token


@dataclass
class DiffusionConfig:
    """The forward process and the objective: sections 2 and 3.1 of the paper."""

    logsnr_min: float = -20.0  # noisiest log-SNR, the paper's lambda_min
    logsnr_max: float = 20.0  # cleanest log-SNR, the paper's lambda_max
    p_uncond: float = 0.1  # probability that a training example loses its condition (Algorithm 1, line 3)
    schedule: str = "cosine"  # distribution of training log-SNRs: cosine (the paper's) | uniform | normal (EDM's) | flow
    prediction: str = "eps"  # what the network predicts: eps (the paper's) | x | v | edm
    loss_weight: str = "paper"  # weight of the eps-error: paper (1) | v | min_snr | edm | elbo


@dataclass
class TrainConfig:
    steps: int = 400_000  # optimizer steps in all
    global_batch: int = 2048  # images per step over all workers; it, never the micro-batch, decides the mathematics
    micro_batch: int = 0  # images per worker and forward pass; 0 = the worker's whole share, without accumulation
    lr: float = 3e-4  # AdamW's peak learning rate
    warmup_steps: int = 0  # steps of linear warm-up from 0 to lr
    schedule: str = "constant"  # after the warm-up: constant | cosine (to 0 at the last step) | inverse_sqrt (EDM2's)
    decay_steps: int = 70_000  # inverse_sqrt: step up to which lr is constant; from there it falls as 1 / sqrt(step)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # AdamW's moment decays
    adam_eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping, as ADM
    ema_decay: float = 0.9999  # decay per step of the averaged weights that sampling uses
    ema_half_lives: list[int] = field(default_factory=list)  # further averages, by half-life in images
    ema_sigma_rel: list[float] = field(default_factory=list)  # EDM2's power-function averages, as [0.05, 0.1]: any other follows
    precision: str = "bf16"  # fp32 | bf16 | fp16 (GPUs only, with loss scaling); master weights and moments are fp32 always
    recompute: bool = False  # activation checkpointing: a second forward in the backward pass saves memory
    compile: bool = False  # torch.compile the network; the first step takes minutes
    deterministic: bool = False  # only kernels that repeat to the bit: slower, and for GPUs, as a CPU repeats anyway
    zero_stage: int = 2  # DeepSpeed ZeRO stage: 0 | 1 | 2 | 3; bf16 needs at least 1
    deepspeed: dict[str, Any] = field(default_factory=dict)  # handed to DeepSpeed as it is, over what freeguide sets
    log_every: int = 50  # steps between two lines of progress and TensorBoard scalars
    sample_every: int = 0  # steps between two TensorBoard sample grids (by a fast sampler); 0 = only at the end
    checkpoint_every: int = 1000  # steps between two checkpoints
    keep_checkpoints: int = 2  # newest checkpoints that stay; older ones are deleted after a newer one is complete
    keep_every: int = 0  # checkpoints of steps that it divides stay for good; 0 = none
    bad_steps: int = 10  # steps of a run that may have gradients that are not finite; such a step moves no weight. Above: back once
    watchdog_seconds: float = 600.0  # a worker without progress for longer ends itself, so that it is restarted; 0 = never


@dataclass
class SamplingConfig:
    """Algorithm 2 of the paper, or a faster sampler. Network evaluations: 2 * steps with guidance, steps without."""

    checkpoint: int = 0  # step of the checkpoint whose averaged weights are sampled; 0 = the newest
    ema: str = "ema"  # weights to sample: ema (train.ema_decay) | half_life_N | sigma_rel_X (any X, from snapshots) | master (raw)
    sampler: str = "ancestral"  # ancestral (Algorithm 2) | ddim | dpmpp_2m | heun
    spacing: str = "u"  # how the log-SNR levels are spaced: u (the paper's, as in training) | logsnr | karras
    steps: int = 256  # T: network levels; T - 1 noisy transitions and one noiseless last step
    v: float = 0.3  # log-variance between the posterior's (0) and the forward process' (1); paper: 0.3 at 64x64, 0.2 at 128x128
    interval: list[float] = field(default_factory=list)  # [low, high]: guide only at these log-SNRs; empty = at all, the paper's
    clip: bool = True  # clamp x to [-1, 1] at every step, as ADM does; without it rounding of eps is amplified at logsnr -20
    precision: str = "fp32"  # of the network: fp32 | bf16 (autocast; the sampler's own arithmetic stays fp32)
    compile: bool = False  # torch.compile the network; the first batch of each shape takes up to minutes
    batch: int = 64  # images per forward pass (twice as many rows with guidance)
    seed: int = 0  # image i depends on (seed, i) only
    labels: str = "balanced"  # balanced (label of image i = i mod classes) | random (drawn by (seed, i))


@dataclass
class GenerateConfig:
    images: int = 50_000  # how many images
    w: float = 0.0  # guidance weight of the paper: (1 + w) eps_c - w eps_u
    unit: int = 1024  # images per work unit and shard: what one failure can lose at most
    npz: bool = True  # also write all images as one samples.npz (uint8 arr_0, labels arr_1), which the ADM evaluator reads


@dataclass
class EvaluateConfig:
    images: int = 50_000  # images per w; FIDs of different n are never compared
    w: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0]
    )  # the rows of the paper's tables
    sweep: dict[str, Any] = field(default_factory=dict)  # a series for each combination: {run: [URIs], sampling.steps: [8, 16]}
    screen: int = 0  # images per w of a first look; only the w near the frontier then get all `images`. 0 = none, -1 = a tenth
    unit: int = 1024  # images per work unit: what one failure can lose at most
    extractor: Uri = ""  # weights of the feature network (Inception, an evaluator), path or URI; empty = the data's own evaluator
    extractor_hash: str = ""  # sha256 that the feature network has to have, as `fit-evaluator` prints it; empty = any
    reference: Uri = ""  # statistics of the real images, an .npz by path or URI; empty = measured on the data set
    dinov2: Uri = ""  # DINOv2's weights, path or URI, for FD-DINOv2 beside the rest; empty = without
    dinov2_hash: str = ""  # sha256 that DINOv2's weights have to have, as rows name it; empty = any
    dinov2_reference: Uri = ""  # its statistics of the real images, an .npz by path or URI; empty = measured on the data set
    others: list[Uri] = field(default_factory=list)  # rows of other models for the report: what `score --json` wrote, paths or URIs
    dataset: str = ""  # name of the real images in tables (imagenet64, ...); empty = the last part of data.uri
    evaluator_epochs: int = 30  # epochs over the real data of the small evaluator network
    evaluator_seed: int = 0  # seed of the evaluator's weights and of its batches
    grid: int = 10  # images per class in the sample grids


@dataclass
class ClusterConfig:
    workers: int = 1  # training workers, one GPU each on a GPU cluster
    min_workers: int = 0  # elastic training: go on with as few where nodes are lost, and take new ones in; 0 = always `workers`
    actors: int = 1  # sampling actors
    cpus_per_worker: float = 1.0  # CPU cores that Ray sets aside for one worker or actor, and threads of its torch
    gpus_per_worker: float = -1.0  # GPUs per worker or actor; -1 = one where the cluster has GPUs, else none
    max_failures: int = 3  # worker failures repaired by starting again from the newest checkpoint; counted anew after a newer one
    env: dict[str, str] = field(default_factory=dict)  # environment variables for every worker (NCCL_DEBUG, ...)


@dataclass
class Config:
    name: str = MISSING  # name of the run; its report is copied to runs/<name>/
    run: Uri = MISSING  # URI of the run: checkpoints, events, samples, evaluations
    seed: int = 0  # seed of the weights, the data order, and the training noise
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
