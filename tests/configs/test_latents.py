"""What a config of raw latents may not ask for."""

from functools import partial
from pathlib import Path

import pytest

from freeguide.cluster.runtime.checks import contradictions
from freeguide.configs import load
from freeguide.configs.errors import ConfigError

load_config = partial(load.load_config, contradictions=contradictions)  # as the commands ask all rooms

LATENTS = "name: x\nrun: r\ndata: {uri: u, channels: 4, dtype: float16, flip: false}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "latents.yaml"
    path.write_text(LATENTS)
    return path


def test_latents_of_any_number_of_channels_train(config: Path) -> None:
    assert load_config(config).data.channels == 4
    with pytest.raises(ConfigError, match=r"data\.channels=4: 1 \(grey\) or 3"):
        load_config(config, ["data.dtype=uint8"])


@pytest.mark.parametrize(
    ("command", "override", "sentence"),
    [
        ("train", "data.dtype=float64", "did you mean float16"),
        ("train", "data.channels=0", "must be a whole number from 1"),
        ("train", "data.latent_scale=0", "must be a number above 0"),
        ("train", "data.flip=true", "a mirrored latent is not the latent of the mirrored image; set data.flip=false"),
        ("train", "train.sample_every=10", "latents are no pictures without their decoder; set it to 0"),
        ("generate", "sampling.clip=true", "would clamp latents"),
        ("evaluate", "data.flip=false", "evaluate measures images"),
    ],
)
def test_what_latents_cannot_do_is_refused_in_a_sentence(config: Path, command: str, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(config, [override], command)
