"""Which options decide a number: all of them, but those named here, each with the reason.

Whatever is added to the schema is so a condition of rows and of the names of units from the first day. A test walks the schema.
"""

import hashlib
import json
from typing import Any

from freeguide.cluster.evaluation.extractors.roles import ROLES, options_of
from freeguide.configs.schema import RENAMED, Config, options
from freeguide.trainer.networks.build import network_options

_DATA = "decides what the data are, whose fingerprint a run has to fit"
_PLACE = "says where something is, not what it is"
_SPEED = "decides how fast it is, or how much memory it takes"
_KEPT = "decides what is shown or kept"
_SHARE = "divides the batch, whose sum is rounded otherwise"
_MEASURED = "decides how images are measured: rows name the extractor and the reference by their hashes"

HARMLESS = {
    "name": "what tables call a run",
    "run": "rows have a column for it",
    "seed": "runs that differ in it alone repeat each other",
    **dict.fromkeys(("data.uri", "data.manifest", "data.path", "data.disk_cache"), _PLACE),
    **dict.fromkeys(("data.source", "data.mixture", "data.shards", "data.skip_broken", "data.resize"), _DATA),
    **dict.fromkeys(("data.shard_samples", "data.bad_images"), _DATA),
    **dict.fromkeys(("data.class_depth", "data.class_names", "data.label_key", "data.background"), _DATA),
    "data.bad_samples": "the share at which a training stops; which samples are replaced does not depend on it",
    "data.request_payer": "says who pays",
    "data.unsigned": "says with which credentials the data are read",
    **dict.fromkeys(("data.fetch_threads", "data.decode_threads", "data.prefetch_batches", "data.cache_mib"), _SPEED),
    "data.disk_cache_gib": _SPEED,
    "diffusion.p_uncond": "rows have a column for it",
    **dict.fromkeys(("train.ema_decay", "train.ema_half_lives", "train.ema_sigma_rel"), "rows name the average that was sampled"),
    "train.lost_averages": "rows name the average that was sampled, and training state does not depend on averages",
    **dict.fromkeys(("train.micro_batch", "train.zero_stage", "cluster.workers", "cluster.min_workers"), _SHARE),
    **dict.fromkeys(("train.recompute", "train.deterministic", "cluster.actors"), _SPEED),
    **dict.fromkeys(("train.log_every", "train.sample_every", "train.sample_w", "train.checkpoint_every"), _KEPT),
    **dict.fromkeys(("train.keep_checkpoints", "train.keep_every"), _KEPT),
    "train.watchdog_seconds": "decides when a worker that hangs is started again, from a checkpoint and with the same bits",
    "sampling.checkpoint": "the checksums of the weights say which they are, and rows have a column for the step",
    "evaluate.images": "rows have a column for it, and units name their images",
    "evaluate.w": "rows and units name their w",
    "evaluate.sweep": "each series has its options",
    "evaluate.screen": "decides which rows are measured",
    **dict.fromkeys(("evaluate.extractor", "evaluate.extractor_hash", "evaluate.reference"), _MEASURED),
    **dict.fromkeys((f"evaluate.{name}" for role in ROLES for name in options_of(role)), _MEASURED),
    **dict.fromkeys(("evaluate.evaluator_epochs", "evaluate.evaluator_seed"), _MEASURED),
    "evaluate.dataset": "rows have a column for it",
    "evaluate.others": "rows of others have their own conditions",
    **dict.fromkeys(("generate.images", "generate.w", "generate.unit"), "the name of a set of samples says it"),
    "generate.npz": "the same images once more",
    "cluster.engine": "decides who runs the same work items",
    "cluster.cpus_per_worker": "the names of units say how many threads made them",
    "cluster.gpus_per_worker": "rows and units name the kind of device",
    "cluster.max_failures": "decides how often a training starts again from a checkpoint, with the same bits",
    "cluster.wait_minutes": "decides how long a command waits for the cluster",
    "cluster.shared_folders": _PLACE,
}


def decisive(config: Config, *groups: str) -> dict[str, Any]:
    """The options of `groups` by dotted key, without the harmless ones and those that the network does not read.

    An option that was renamed stands under its first name, so that rows of before and after compare.
    """
    read = {f"model.{name}" for name in network_options(config.model)}
    found, first = {}, {new: old for old, new in RENAMED.items()}
    for key in options():
        group, _, name = key.partition(".")
        if name and group in groups and key not in HARMLESS and (group != "model" or key in read):
            found[first.get(key, key)] = getattr(getattr(config, group), name)
    if "cluster.env" in found:  # may hold what nobody should read
        found["cluster.env"] = hashlib.sha256(json.dumps(found["cluster.env"], sort_keys=True).encode()).hexdigest()[:12]
    return found


def trained(config: Config) -> str:
    """A short hash of what was trained and how, for `config` as the run has it: runs that differ in it are no repetitions."""
    chosen = decisive(config, "data", "model", "diffusion", "train", "cluster")
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


def sampled(config: Config) -> dict[str, Any]:
    """What decides the images of given weights, and what is kept of them; the training is said by the weights' checksums."""
    return decisive(config, "data", "model", "diffusion", "sampling", "evaluate", "cluster")
