"""A cluster that is large enough, too small, or grows."""

import pytest

from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.runtime import room
from freeguide.cluster.runtime.room import room_for
from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import ClusterConfig


class Cluster:
    """What Ray says of a cluster: its nodes at each look, whether it grows, and what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: list[list[dict[str, float]]], grows: bool | None = False) -> None:
        self.looks, self.asked, self.now = looks, [], 0.0  # type: ignore[var-annotated]
        monkeypatch.setattr(room.ray, "nodes", self._nodes)
        monkeypatch.setattr(room, "_grows", lambda: grows)
        monkeypatch.setattr(room, "_ask_autoscaler", self.asked.append)
        monkeypatch.setattr(room.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(room.time, "sleep", self._sleep)

    def _nodes(self) -> list[dict[str, object]]:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return [{"Alive": True, "Resources": node} for node in found] + [{"Alive": False, "Resources": {"CPU": 99.0}}]

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


SMALL = [{"CPU": 2.0}, {"CPU": 2.0}]
FAST = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}]


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "processes", "together", "given"),
    [
        (SMALL, 1.0, -1.0, 4, True, Resources(1.0, 0.0)),
        (SMALL, 2.0, 0.0, 2, True, Resources(2.0, 0.0)),
        (SMALL, 0.1, 0.0, 40, True, Resources(0.1, 0.0)),
        (FAST, 1.0, -1.0, 2, True, Resources(1.0, 1.0)),
        (FAST, 1.0, 0.5, 4, True, Resources(1.0, 0.5)),
        (SMALL, 1.0, -1.0, 9, False, Resources(1.0, 0.0)),  # actors wait for each other
    ],
)
def test_a_cluster_that_is_large_enough_is_used(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], cpus: float, gpus: float, processes: int, together: bool,
    given: Resources,
) -> None:  # fmt: skip
    Cluster(monkeypatch, [nodes])
    assert room_for(ClusterConfig(cpus_per_worker=cpus), gpus, processes, together) == given


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "processes", "together", "sentence"),
    [
        (SMALL, 1.0, -1.0, 5, True, r"5 processes of 1 CPU, it has room for 4 \(nodes: 2 of 2 CPU\); lower cluster.workers"),
        (SMALL, 3.0, -1.0, 1, True, "1 process of 3 CPU, it has room for 0"),
        (SMALL, 3.0, 0.0, 8, False, "1 process of 3 CPU, it has room for 0"),
        (SMALL, 1.0, 1.0, 1, False, r"1 process of 1 CPU and 1 GPU, it has room for 0 \(nodes: 2 of 2 CPU and 0 GPU\)"),
        (FAST, 5.0, -1.0, 2, True, r"2 processes of 5 CPU and 1 GPU, it has room for 1 \(nodes: 1 of 8 CPU and 2 GPU, 1 of"),
    ],
)
def test_a_cluster_that_is_too_small_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], cpus: float, gpus: float, processes: int, together: bool,
    sentence: str,
) -> None:  # fmt: skip
    cluster = Cluster(monkeypatch, [nodes])
    with pytest.raises(ConfigError, match=f"^the cluster is too small for {sentence}"):
        room_for(ClusterConfig(cpus_per_worker=cpus), gpus, processes, together)
    assert (cluster.now, cluster.asked) == (0.0, [])


def test_a_cluster_is_waited_for_on_purpose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(monkeypatch, [SMALL, SMALL, [*SMALL, {"CPU": 2.0}]])
    assert room_for(ClusterConfig(wait_minutes=1), -1.0, 6, True) == Resources(1.0, 0.0)
    said = capsys.readouterr().out
    assert said.count("waiting for it to grow, for 1 minutes at most\n") == len(said.splitlines()) == 1
    assert cluster.asked == [[{"CPU": 1.0}] * 6, []]
    cluster = Cluster(monkeypatch, [SMALL])
    with pytest.raises(ConfigError, match="too small for 6 processes"):
        room_for(ClusterConfig(wait_minutes=1), -1.0, 6, True)
    assert 60 <= cluster.now <= 65


def test_a_cluster_with_an_autoscaler_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    large = {"CPU": 8.0, "GPU": 8.0}
    cluster = Cluster(monkeypatch, [*[[{"CPU": 0.0}]] * 1000, [large]], grows=True)
    assert room_for(ClusterConfig(), 1.0, 8, True) == Resources(1.0, 1.0)
    assert capsys.readouterr().out.count("waiting for it to grow\n") == 1
    assert cluster.asked == [[{"CPU": 1.0, "GPU": 1.0}] * 8, []]


def test_an_autoscaler_has_a_while_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, [SMALL], grows=None)
    with pytest.raises(ConfigError, match="too small"):
        room_for(ClusterConfig(), 0.0, 5, True)
    assert cluster.now == room._REPORTS
