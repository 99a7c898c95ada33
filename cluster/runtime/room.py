"""Room on a cluster: what each process gets, and waiting for a cluster that is too small and may grow."""

import json
import math
import os
import time
from collections import Counter

import ray
import ray.autoscaler.sdk
from ray._private import ray_constants
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental import internal_kv

from freeguide.cluster.evaluation.executor import Resources
from freeguide.configs.errors import ConfigError, counted
from freeguide.configs.schema import ClusterConfig

_LOOK_SECONDS = 5.0  # between two looks at a cluster that is too small
_REPORTS = 20.0  # seconds after its start in which an autoscaler has reported


def room_for(options: ClusterConfig, gpus: float, processes: int, together: bool) -> Resources:
    """What each of `processes` gets, once those that have to run at the same time have a place: all `together`, or one.

    A cluster that is too small is waited for where it grows by itself, or for `cluster.wait_minutes`. Raises ConfigError.
    """
    began, least, asked = time.monotonic(), processes if together else 1, None
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        each = Resources(options.cpus_per_worker, _gpus(gpus, nodes))
        room = sum(_places(each, node) for node in nodes)
        if room >= least:
            break
        grows = _grows()
        bound = 60 * options.wait_minutes if options.wait_minutes or grows is False else math.inf
        if grows is None:  # its autoscaler, if it has one, has not reported yet
            bound = max(60 * options.wait_minutes, _REPORTS)
        lack, mend = _lack(each, least, room, nodes)
        if time.monotonic() - began >= bound:
            raise ConfigError(f"{lack}; {mend}")
        if asked is None and grows is not None:
            until = "" if bound == math.inf else f", for {options.wait_minutes:g} minutes at most"
            print(f"{lack}; waiting for it to grow{until}", flush=True)
        if grows is not None and asked != each:
            _ask_autoscaler([each.bundle] * least)
            asked = each
        time.sleep(_LOOK_SECONDS)
    if asked is not None:
        _ask_autoscaler([])  # what it waits for from here on, Ray knows
    if room < processes:
        print(f"the cluster has room for {room} of {processes} processes: what does not fit starts when it grows", flush=True)
    return each


def _gpus(gpus: float, nodes: list[dict[str, float]]) -> float:
    return gpus if gpus >= 0 else float(any(node.get("GPU", 0) for node in nodes))


def _places(each: Resources, node: dict[str, float]) -> int:
    """How many processes fit on a node that has nothing else to do."""
    return min(int(node.get(kind, 0) / amount + 1e-6) for kind, amount in each.bundle.items())


def _lack(each: Resources, least: int, room: int, nodes: list[dict[str, float]]) -> tuple[str, str]:
    """What is missing, and what to do about it."""
    kinds = each.bundle
    has = Counter(" and ".join(f"{node.get(kind, 0):g} {kind}" for kind in kinds) for node in nodes)
    there = ", ".join(f"{count} of {what}" for what, count in has.most_common(4))
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in kinds.items())
    processes = counted(least, "process", "processes")
    return (
        f"the cluster is too small for {processes} of {wanted}, it has room for {room} (nodes: {there})",
        "lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker, or set cluster.wait_minutes if it will grow",
    )


def _grows() -> bool | None:
    """Whether an autoscaler adds nodes; None where nobody has said yet. One without a configuration calls each type node_ID."""
    if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        return None
    report = internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    kinds = {node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)}
    if report:
        kinds |= {*json.loads(report).get("autoscaler_report", {}).get("node_type_mapping", {}).values()}
    if any(not kind.startswith("node_") for kind in kinds):
        return True
    return False if report else None


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    ray.autoscaler.sdk.request_resources(bundles=bundles)
