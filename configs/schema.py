"""Every option of freeguide: its type, its unit, its default, what it may be, and one line of why.

A YAML file and `key=value` overrides are merged onto `Config` by `configs.load`. Options are grouped by the room that reads
them. Locations are URIs: `s3://bucket/prefix` or a folder; `load` makes them absolute, so that a config means the same places on
every machine and in every process. Defaults are the paper's (arXiv 2207.12598) where it states them.

What an option may be stands here and nowhere else: words as `Literal`, numbers as `Range`, texts as `Pattern`. `configs.checks`
reads them, and what options ask of each other. Upper limits are beyond what anybody needs: they stop slips of the pen before
something is allocated.
"""

import functools
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import MISSING

LOCATION = "location"
Uri = Annotated[str, LOCATION]  # marks the texts that name a place


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`. The ends belong to it, but for an open one."""

    least: float
    most: float
    open: Literal["", "least", "most", "both"] = ""
    also: float | None = None  # a number outside that has a meaning of its own


@dataclass(frozen=True)
class Pattern:
    """The texts that the whole regular expression describes, which `words` say in words."""

    expression: str
    words: str


@dataclass(frozen=True)
class Length:
    """Of a list."""

    least: int
    most: int


# Numbers
Count = Annotated[int, Range(1, 10**9)]  # of images
CountOrNone = Annotated[int, Range(0, 10**9)]
Million = Annotated[int, Range(1, 10**6)]
MillionOrNone = Annotated[int, Range(0, 10**6)]
Few = Annotated[int, Range(1, 1024)]  # threads, batches in hand, blocks, heads
Steps = Annotated[int, Range(1, 10**10)]
StepsOrNone = Annotated[int, Range(0, 10**10)]
Depth = Annotated[int, Range(0, 100)]  # of folders
Level = Annotated[int, Range(0, 255)]  # of grey
Pixels = Annotated[int, Range(1, 4096)]  # per side
Width = Annotated[int, Range(1, 65_536)]  # channels
WidthOrNone = Annotated[int, Range(0, 65_536)]
Mib = Annotated[int, Range(1, 2**20)]
Gib = Annotated[float, Range(0, 2**20, open="least")]
Seconds = Annotated[float, Range(0, 10**7)]
Minutes = Annotated[float, Range(0, 10**6)]
Scale = Annotated[float, Range(0, 10**6, open="least")]
Rate = Annotated[float, Range(0, 10, open="least")]  # of learning
Small = Annotated[float, Range(0, 1, open="least")]
Penalty = Annotated[float, Range(0, 100)]
Norm = Annotated[float, Range(0, 10**9)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, open="most")]
SigmaRel = Annotated[float, Range(0, 0.2886, open="both")]  # 12^-1/2 is that of the plain mean of all steps, the widest
LogSNR = Annotated[float, Range(-80, 80)]  # fp32's exponential ends at 88
Guidance = Annotated[float, Range(0, 1000)]
Levels = Annotated[int, Range(1, 100_000)]  # of log-SNR
Measured = Annotated[int, Range(10, 10**9)]  # images: one for each split of the Inception score
Screen = Annotated[int, Range(0, 10**9, also=-1)]
Seed = Annotated[int, Range(0, 2**64 - 1)]
TorchSeed = Annotated[int, Range(0, 2**63 - 1)]
Workers = Annotated[int, Range(1, 100_000)]
WorkersOrNone = Annotated[int, Range(0, 100_000)]
Cpus = Annotated[float, Range(0, 4096, open="least")]
Gpus = Annotated[float, Range(0, 64, also=-1)]
Failures = Annotated[int, Range(0, 10**6, also=-1)]

# Lists of them
Multiples = Annotated[list[Few], Length(1, 16)]
MapSizes = Annotated[list[Pixels], Length(0, 16)]
Betas = Annotated[list[Decay], Length(2, 2)]
HalfLives = Annotated[list[Annotated[int, Range(1, 10**15)]], Length(0, 16)]
SigmaRels = Annotated[list[SigmaRel], Length(0, 16)]
Interval = Annotated[list[LogSNR], Length(0, 2)]
Guidances = Annotated[list[Guidance], Length(1, 1000)]

# Words and texts
Source = Literal["digits", "folder", "idx", "parquet", "webdataset"]
Resize = Literal["adm", "area", "box"]
Dtype = Literal["uint8", "float16", "float32"]
Network = Literal["adm", "dit"]
Noise = Literal["cosine", "uniform", "normal", "flow"]
Prediction = Literal["eps", "x", "v", "edm"]
LossWeight = Literal["paper", "v", "min_snr", "edm", "elbo"]
Decline = Literal["constant", "cosine", "inverse_sqrt"]
LostAverages = Literal["stop", "drop"]
Precision = Literal["fp32", "bf16", "fp16"]
Autocast = Literal["fp32", "bf16"]
ZeroStage = Literal[0, 1, 2, 3]
SamplerName = Literal["ancestral", "ddim", "dpmpp_2m", "heun"]
Spacing = Literal["u", "logsnr", "karras"]
Labels = Literal["balanced", "random"]
EngineName = Literal["ray", "local"]
Name = Annotated[str, Pattern(r"[\w-][\w.-]{0,199}", "must name a folder under runs/, of letters, digits, '_', '-' and '.'")]
Sha256 = Annotated[str, Pattern("|[0-9a-f]{64}", "a sha256 has 64 hexadecimal digits, in lower case")]
Average = Annotated[
    str,
    Pattern(
        r"ema|master|half_life_\d+|sigma_rel_0?\.\d+",
        "one of ema, master, half_life_N (train.ema_half_lives), sigma_rel_X such as sigma_rel_0.1",
    ),
]


@dataclass
class DataConfig:
    uri: Uri = MISSING  # where the shards and their manifest stand
    manifest: Uri = ""  # where the manifest and all else that belongs to the data stands, if `uri` may only be read; empty = there
    request_payer: bool = False  # the bucket's owner has those who read it pay, and you agree to
    unsigned: bool = False  # read public data without credentials, although you have some; without any that is so anyway
    source: Source = "folder"  # what `prepare` reads: scikit-learn's digits | folder (class/name.png) | idx | parquet | webdataset
    path: Uri = ""  # the folder of class folders, IDX or Parquet files; the URI of tars that `index` has been run on
    mixture: dict[Uri, Million] = field(default_factory=dict)  # `index` joins these data sets, {URI: weight}, into one at `uri`
    shards: str = ""  # what `index` reads: tars under `uri` in brace notation, a-{000..099}.tar; empty = all of them
    skip_broken: bool = False  # whether `index` leaves out broken tars instead of stopping
    image_size: Pixels = 64  # pixels per side; other images are centre-cropped and resized
    resize: Resize = "adm"  # how `prepare` resizes: adm (halvings, bicubic) | area (each pixel the mean of what it covers) | box
    channels: Width = 3  # 1 = grey, 3 = RGB; latents have any number
    dtype: Dtype = "uint8"  # what a sample is: uint8 (an image) | float16 | float32 (raw latents, .npy arrays (C, H, W))
    latent_scale: Scale = 1.0  # latents are multiplied by it when they are read; Stable Diffusion's autoencoder wants 0.18215
    classes: MillionOrNone = 0  # number of classes, 0 = as many as the data have; labels are 0 .. classes - 1
    class_depth: Depth = 1  # of a folder: how many levels down the folders are that are classes; 0 = none, all one class
    class_names: Uri = ""  # file of the class names, one a line, in the order of their numbers; empty = folders in sorted order
    label_key: str = ""  # where labels stand: a member of tars (txt), a key of .json, a column (a.b: b in a); empty = .cls, label
    background: Level = 255  # grey value under what is transparent in a picture that `prepare` reads; 255 = white
    flip: bool = True  # random horizontal flip, drawn by global sample index
    shard_samples: Count = 4096  # samples per shard that `prepare` writes
    bad_images: Fraction = 0.0  # share of the source images that may be unreadable and left out before `prepare` stops
    bad_samples: Fraction = 0.0  # share of the training samples that may be unreadable and replaced before training stops
    fetch_threads: Few = 4  # concurrent ranged GETs of one worker
    decode_threads: Few = 2  # threads of one worker that turn bytes into pixels
    prefetch_batches: Few = 4  # batches held ready ahead of the training step
    cache_mib: Mib = 512  # MiB of undecoded windows that one worker may hold in memory
    disk_cache: Uri = ""  # folder on each node's own disk for what was read from the store; empty = none
    disk_cache_gib: Gib = 100.0  # GiB that this folder may hold; what was read longest ago goes first


@dataclass
class ModelConfig:
    """The ADM U-Net (Dhariwal & Nichol 2021) or a DiT (Peebles & Xie 2023). Defaults: the network of the paper's 64x64 models.

    A DiT reads network, channels, heads, depth, patch and learn_sigma; it has no dropout.
    """

    network: Network = "adm"  # adm | dit
    channels: Width = 192  # adm: width of the first level; dit: width of a token
    channel_mult: Multiples = field(default_factory=lambda: [1, 2, 3, 4])  # width of each level, in units of `channels`
    res_blocks: Few = 3  # residual blocks per level
    attention: MapSizes = field(default_factory=lambda: [32, 16, 8])  # feature-map sizes (pixels) that get self-attention
    heads: Few = 4  # adm: attention heads where head_channels is 0; dit: attention heads
    head_channels: WidthOrNone = 64  # channels per attention head; 0 = use `heads`
    resblock_updown: bool = True  # change resolution inside residual blocks (BigGAN's way) instead of by strided convolution
    scale_shift_norm: bool = True  # condition by scale and shift of the group norm (adaptive group norm)
    dropout: Decay = 0.1  # dropped activations in residual blocks; masks are drawn by global sample index
    learn_sigma: bool = False  # ADM's second set of output channels; the paper fixes the variance with v, so off
    depth: Few = 28  # dit: transformer blocks
    patch: Few = 2  # dit: pixels per side of a token


@dataclass
class DiffusionConfig:
    """The forward process and the objective: sections 2 and 3.1 of the paper."""

    logsnr_min: LogSNR = -20.0  # noisiest log-SNR, the paper's lambda_min
    logsnr_max: LogSNR = 20.0  # cleanest log-SNR, the paper's lambda_max
    p_uncond: Fraction = 0.1  # probability that a training example loses its condition (Algorithm 1, line 3)
    schedule: Noise = "cosine"  # distribution of training log-SNRs: cosine (the paper's) | uniform | normal (EDM's) | flow
    prediction: Prediction = "eps"  # what the network predicts: eps (the paper's) | x | v | edm
    loss_weight: LossWeight = "paper"  # weight of the eps-error: paper (1) | v | min_snr | edm | elbo


@dataclass
class TrainConfig:
    steps: Steps = 400_000  # optimizer steps in all
    global_batch: Count = 2048  # images per step over all workers; it, never the micro-batch, decides the mathematics
    micro_batch: CountOrNone = 0  # images per worker and forward pass; 0 = the worker's whole share, without accumulation
    lr: Rate = 3e-4  # AdamW's peak learning rate
    warmup_steps: StepsOrNone = 0  # steps of linear warm-up from 0 to lr
    lr_schedule: Decline = "constant"  # lr after the warm-up: constant | cosine (to 0 at the last step) | inverse_sqrt (EDM2's)
    decay_steps: Steps = 70_000  # inverse_sqrt: step up to which lr is constant; from there it falls as 1 / sqrt(step)
    betas: Betas = field(default_factory=lambda: [0.9, 0.999])  # AdamW's moment decays
    adam_eps: Small = 1e-8  # AdamW's epsilon
    weight_decay: Penalty = 0.0  # AdamW's decoupled weight decay
    grad_clip: Norm = 1.0  # largest global gradient norm; 0 = no clipping, as ADM
    ema_decay: Decay = 0.9999  # decay per step of the averaged weights that sampling uses
    ema_half_lives: HalfLives = field(default_factory=list)  # further averages, by half-life in images
    ema_sigma_rel: SigmaRels = field(default_factory=list)  # EDM2's power-function averages, as [0.05, 0.1]: any other follows
    lost_averages: LostAverages = "stop"  # of a checkpoint: stop (unless an earlier one has all) | drop (go on without them)
    precision: Precision = "bf16"  # fp32 | bf16 | fp16 (GPUs only, with loss scaling); master weights and moments are fp32 always
    recompute: bool = False  # activation checkpointing: a second forward in the backward pass saves memory
    compile: bool = False  # torch.compile the network; the first step takes minutes
    deterministic: bool = False  # only kernels that repeat to the bit: slower, and for GPUs, as a CPU repeats anyway
    zero_stage: ZeroStage = 2  # DeepSpeed ZeRO stage: 0 | 1 | 2 | 3; bf16 needs at least 1
    deepspeed: dict[str, Any] = field(default_factory=dict)  # handed to DeepSpeed as it is, over what freeguide sets
    log_every: Steps = 50  # steps between two lines of progress and TensorBoard scalars
    sample_every: StepsOrNone = 0  # steps between two TensorBoard sample grids (by a fast sampler); 0 = only at the end
    sample_w: Guidance = (
        0.0  # guidance weight of these grids: one w all along, so that they compare, whatever generate.w is by then
    )
    checkpoint_every: Steps = 1000  # steps between two checkpoints
    keep_checkpoints: Million = 2  # newest checkpoints that stay; older ones are deleted after a newer one is complete
    keep_every: StepsOrNone = 0  # checkpoints of steps that it divides stay for good; 0 = none
    bad_steps: StepsOrNone = 10  # steps of a run that may have gradients that are not finite and move no weight. More: back once
    watchdog_seconds: Seconds = 600.0  # a worker without progress for longer ends itself, so that it is restarted; 0 = never


@dataclass
class SamplingConfig:
    """Algorithm 2 of the paper, or a faster sampler. Network evaluations: 2 * steps with guidance, steps without."""

    checkpoint: StepsOrNone = 0  # step of the checkpoint whose averaged weights are sampled; 0 = the newest
    ema: Average = "ema"  # weights to sample: ema (train.ema_decay) | half_life_N | sigma_rel_X (from snapshots) | master (raw)
    lost_snapshots: bool = False  # whether sigma_rel_X may be made of the snapshots that are left, where some are lost
    sampler: SamplerName = "ancestral"  # ancestral (Algorithm 2) | ddim | dpmpp_2m | heun
    spacing: Spacing = "u"  # how the log-SNR levels are spaced: u (the paper's, as in training) | logsnr | karras
    steps: Levels = 256  # T: network levels; T - 1 noisy transitions and one noiseless last step
    v: Fraction = 0.3  # log-variance between the posterior's (0) and the forward process' (1); paper: 0.3 at 64x64, 0.2 at 128x128
    interval: Interval = field(default_factory=list)  # [low, high]: guide only at these log-SNRs; empty = at all, the paper's
    clip: bool = True  # clamp x to [-1, 1] at every step, as ADM does; without it rounding of eps is amplified at logsnr -20
    precision: Autocast = "fp32"  # of the network: fp32 | bf16 (autocast; the sampler's own arithmetic stays fp32)
    compile: bool = False  # torch.compile the network; the first batch of each shape takes up to minutes
    batch: Million = 64  # images per forward pass (twice as many rows with guidance)
    seed: Seed = 0  # image i depends on (seed, i) only
    labels: Labels = "balanced"  # balanced (label of image i = i mod classes) | random (drawn by (seed, i))


@dataclass
class GenerateConfig:
    images: Count = 50_000  # how many images
    w: Guidance = 0.0  # guidance weight of the paper: (1 + w) eps_c - w eps_u
    unit: Million = 1024  # images per work unit and shard: what one failure can lose at most
    npz: bool = True  # also write all images as one samples.npz (uint8 arr_0, labels arr_1), which the ADM evaluator reads


@dataclass
class EvaluateConfig:
    images: Measured = 50_000  # images per w; FIDs of different n are never compared
    w: Guidances = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0]
    )  # the rows of the paper's tables
    sweep: dict[str, Any] = field(default_factory=dict)  # a series for each combination: {run: [URIs], sampling.steps: [8, 16]}
    screen: Screen = 0  # images per w of a first look; only the w near the frontier then get all `images`. 0 = none, -1 = a tenth
    unit: Million = 1024  # images per work unit: what one failure can lose at most
    extractor: Uri = ""  # weights of the feature network (Inception, an evaluator), path or URI; empty = the data's own evaluator
    extractor_hash: Sha256 = ""  # sha256 that the feature network has to have, as `fit-evaluator` prints it; empty = any
    reference: Uri = ""  # statistics of the real images, an .npz by path or URI; empty = measured on the data set
    dinov2: Uri = ""  # DINOv2's weights, path or URI, for FD-DINOv2 beside the rest; empty = without
    dinov2_hash: Sha256 = ""  # sha256 that DINOv2's weights have to have, as rows name it; empty = any
    dinov2_reference: Uri = ""  # its statistics of the real images, an .npz by path or URI; empty = measured on the data set
    others: list[Uri] = field(default_factory=list)  # rows of other models for the report: what `score --json` wrote, paths or URIs
    dataset: str = ""  # name of the real images in tables (imagenet64, ...); empty = the last part of data.uri
    evaluator_epochs: Million = 30  # epochs over the real data of the small evaluator network
    evaluator_seed: TorchSeed = 0  # seed of the evaluator's weights and of its batches
    grid: Few = 10  # images per class in the sample grids


@dataclass
class ClusterConfig:
    engine: EngineName = "ray"  # where work runs: ray (workers and actors of a cluster) | local (this process alone, without Ray)
    workers: Workers = 1  # training workers, one GPU each on a GPU cluster
    min_workers: WorkersOrNone = 0  # elastic: go on with as few where nodes are lost, and take new ones in; 0 = always `workers`
    actors: Workers = 1  # sampling actors
    cpus_per_worker: Cpus = 1.0  # CPU cores that Ray sets aside for one worker or actor, and threads of its torch
    gpus_per_worker: Gpus = -1.0  # GPUs per worker or actor; -1 = one where the cluster has GPUs, else none
    max_failures: Failures = 3  # worker failures repaired from the newest checkpoint, counted anew after a newer one; -1 = all
    wait_minutes: Minutes = 0.0  # how long a command waits for a cluster that is too small for it to grow; 0 = not at all
    shared_folders: list[str] = field(default_factory=list)  # folders that all nodes share under this path (NFS), for --submit
    env: dict[str, str] = field(default_factory=dict)  # environment variables for every worker (NCCL_DEBUG, ...)


@dataclass
class Config:
    name: Name = MISSING  # name of the run; its report is copied to runs/<name>/
    run: Uri = MISSING  # URI of the run: checkpoints, events, samples, evaluations
    seed: Seed = 0  # seed of the weights, the data order, and the training noise
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    # No option: what was written with `${...}`, by key, and the value that it had. `to_yaml` shows what was written.
    written: dict[str, tuple[Any, Any]] = field(
        default_factory=dict, compare=False, repr=False, metadata={"omegaconf_ignore": True}
    )


# Options that had another name, {that: this}, each within its group: what was written with it goes on to work.
RENAMED = {"train.schedule": "train.lr_schedule"}


@functools.cache
def options(schema: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its type, annotations included; groups are listed too."""
    types, found = get_type_hints(schema, include_extras=True), {}
    for option in fields(schema):
        if "omegaconf_ignore" not in option.metadata:
            found[f"{prefix}{option.name}"] = types[option.name]
            if is_dataclass(types[option.name]):
                found.update(options(types[option.name], f"{prefix}{option.name}."))
    return found
