"""`freeguide export`: the averaged weights of a run as one safetensors file, with a card that says what they are."""

import hashlib
import json

import safetensors.torch

from freeguide.cluster.evaluation.report.page import read_latest, read_part
from freeguide.cluster.evaluation.rows import model_conditions
from freeguide.cluster.evaluation.series import as_trained
from freeguide.configs.errors import DataError
from freeguide.configs.schema import Config
from freeguide.configs.stored import from_yaml, to_yaml
from freeguide.configs.untrusted import JSON_BYTES, parse_json
from freeguide.data_pipeline.artifact import check_seal
from freeguide.data_pipeline.claim import claim, release
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.weights import Weights


def export(config: Config) -> str:
    """Write `export/<name>-<step>-<weights>.safetensors` and its card (`.md`) into the run; returns the URI of the weights.

    The weights are `sampling.ema` of checkpoint `sampling.checkpoint`, in fp32, by parameter name; the card states the config
    that the run was last trained with. No process group, no cluster.
    Raises UserError if there is no such checkpoint or average.
    """
    trained = as_trained(config, "export")
    config, found, run = trained.config, trained.weights, open_store(config.run)
    run.clean_up()
    weights = found.read()
    stored = to_yaml(from_yaml(run.get("config.yaml", JSON_BYTES).decode(errors="replace")))  # without secrets, whoever wrote it
    facts = {"config": stored, "step": found.step, "weights": config.sampling.ema, "checkpoint_sha256": found.of[0]}
    # One metadata entry: safetensors writes several in the random order of a hash map, and equal runs should give equal bytes.
    data = safetensors.torch.save(weights, {"freeguide": json.dumps(facts, sort_keys=True)})
    key = f"export/{config.name}-{found.step:08d}-{config.sampling.ema}"
    card = _card(config, found, data, _table(config, run, found), stored).encode()
    # Weights and card say one thing: of two that export something else under this name, one is told so.
    place, identity = run.child(key), hashlib.sha256(data + card).hexdigest()
    claim(place, "export", identity)
    try:
        run.put(f"{key}.safetensors", data)
        run.put(f"{key}.md", card)
    finally:
        release(place, identity)
    uri = f"{run.uri}/{key}.safetensors"
    print(f"{sum(w.numel() for w in weights.values()):,} parameters of step {found.step}, {len(data) / 2**20:.1f} MiB: {uri}")
    return uri


def _table(config: Config, run: Store, found: Weights) -> str:
    """The table of the newest evaluation, if it measured these weights and no others."""
    these = model_conditions(config, found.step, "")
    try:
        place, sums = read_latest(run)
        data = read_part(run, place, "report.json", sums)
        check_seal(data, f"{run.uri}/{place}report.json", "run `freeguide evaluate` again")
        rows = parse_json(data)["rows"]  # of any version
        same = all(row[name] == these[name] for row in rows for name in ("run", "checkpoint_step", "ema"))
        return read_part(run, place, "table.md", sums).decode(errors="replace") if rows and same else ""
    except MissingObject:
        return ""
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run.uri}: the newest report cannot be read ({error}); run `freeguide evaluate` again") from error


def _card(config: Config, found: Weights, data: bytes, table: str, trained: str) -> str:
    images, diffusion = config.data, config.diffusion
    shape = f"{images.image_size}x{images.image_size}x{images.channels}, {images.classes} classes"
    rows = {
        "weights": f"`{config.sampling.ema}` of step {found.step}, fp32, sha256 {hashlib.sha256(data).hexdigest()}",
        "network": f"`trainer.networks.build.build_network`, {shape}; class {images.classes} is the null class",
        "conditioned on": f"log-SNR in [{diffusion.logsnr_min:g}, {diffusion.logsnr_max:g}]; predicts {diffusion.prediction}",
        "trained with": f"p_uncond {diffusion.p_uncond:g}, data {found.data[:12] or '?'}",
    }
    facts = "\n".join(f"- {name}: {value}" for name, value in rows.items())
    measured = table or "Not measured yet: run `freeguide evaluate` and export again.\n"
    return f"# {config.name}\n\n{facts}\n\n## Measured\n\n{measured}\n## Config\n\n```yaml\n{trained}```\n"
