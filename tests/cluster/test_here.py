"""This machine: who gets a GPU, and work items in this very process."""

import pytest
import torch

from freeguide.cluster.runtime.here import gpus_here
from freeguide.configs.errors import ConfigError


@pytest.mark.parametrize(
    ("there", "asked", "processes", "together", "given"),
    [
        (0, -1.0, 2, True, 0.0),
        (1, -1.0, 2, True, 0.0),  # the second worker would be waited for for ever
        (2, -1.0, 2, True, 1.0),
        (1, -1.0, 4, False, 1.0),  # one actor works alone
        (8, 0.0, 2, True, 0.0),
        (1, 0.5, 2, True, 0.5),
    ],
)
def test_workers_share_out_gpus_or_have_none(
    monkeypatch: pytest.MonkeyPatch, there: int, asked: float, processes: int, together: bool, given: float
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert gpus_here(asked, processes, together) == given


def test_gpus_that_are_left_out_are_mentioned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpus_here(-1.0, 2, together=True)
    assert capsys.readouterr().out == "this machine has 1 GPU for 2 workers, so none is used; set cluster.workers=1\n"


def test_more_gpus_than_there_are_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="for 2 processes needs 2 GPUs and this machine has 1; set it to 0, or name a cluster"):
        gpus_here(1.0, 2, together=True)
