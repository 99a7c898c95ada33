"""An exported file holds the averaged weights, and its card says what they are, whatever the config at hand says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from freeguide.cluster.evaluation.report.page import LATEST
from freeguide.cluster.jobs.export import export
from freeguide.configs.errors import CheckpointError
from freeguide.configs.load import load_config
from freeguide.configs.stored import from_yaml
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.shards import Sample, Source, write_shards
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.checkpoints import averages, search
from tests.cluster.untrained import DIGITS, write_run


def test_the_card_and_the_weights_are_those_of_the_run(tmp_path: Path) -> None:
    source = Source(Schema(8, 1, 10), 20, lambda i: Sample(np.zeros((8, 8, 1), np.uint8), i % 10), "black")
    write_shards(source, open_store(f"{tmp_path}/data"))
    small = ["model.channels=8", "model.head_channels=8", "model.channel_mult=[1]", "model.attention=[]"]
    config = load_config(DIGITS, [*small, f"run={tmp_path}/run", f"data.uri={tmp_path}/data", "diffusion.p_uncond=0.2"])
    run = write_run(config)
    path = Path(export(replace(config, diffusion=replace(config.diffusion, p_uncond=0.1))))
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["freeguide"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = averages.average(run, search.find(run), "ema")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert (from_yaml(facts["config"]).diffusion.p_uncond, facts["step"]) == (0.2, 8)
    card = path.with_suffix(".md").read_text()
    assert "p_uncond 0.2" in card
    assert "class 10 is the null class" in card
    assert "Not measured yet" in card
    # What the run was trained with is what its own config.yaml says, not the config at hand.
    other = replace(config, train=replace(config.train, lr=0.7), name="other")
    assert json.loads(safetensors.safe_open(export(other), "pt").metadata()["freeguide"])["config"] == facts["config"]
    with pytest.raises(CheckpointError, match="holds no average half_life_7"):
        export(replace(config, sampling=replace(config.sampling, ema="half_life_7")))


def test_a_table_of_other_weights_is_not_theirs(tmp_path: Path) -> None:
    source = Source(Schema(8, 1, 10), 20, lambda i: Sample(np.zeros((8, 8, 1), np.uint8), i % 10), "black")
    write_shards(source, open_store(f"{tmp_path}/data"))
    small = ["model.channels=8", "model.head_channels=8", "model.channel_mult=[1]", "model.attention=[]"]
    config = load_config(DIGITS, [*small, f"run={tmp_path}/run", f"data.uri={tmp_path}/data"])
    run = write_run(config)
    measured = {"run": "digits", "checkpoint_step": 8, "ema": config.train.ema_decay}
    run.put("report/table.md", b"THE TABLE")
    run.put(LATEST, b'{"report": "report/"}')
    for row, ours in ((measured, True), (measured | {"ema": "master"}, False), (measured | {"run": "p0.1"}, False)):
        run.put("report/report.json", json.dumps({"rows": [measured, row]}).encode())
        assert ("THE TABLE" in Path(export(config)).with_suffix(".md").read_text()) == ours
