"""Servers on this machine are reached directly, whatever proxy the environment names."""

import os
from collections.abc import MutableMapping

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")  # urllib, and so botocore, compares an address of IPv6 with its brackets


def reach_loopback_directly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add loopback to `no_proxy` and `NO_PROXY` if a proxy is set. Idempotent; children inherit it.

    botocore, requests, urllib, aiohttp and gRPC read these variables, some the one name first and some the other. No proxy can
    reach a server on this machine's loopback, so nothing is taken from anybody.
    """
    if not any(value for name, value in environment.items() if name.lower().endswith("_proxy") and name.lower() != "no_proxy"):
        return  # on macOS, no_proxy alone would turn off the proxies of the system settings
    lower, upper = environment.get("no_proxy"), environment.get("NO_PROXY")
    for name, listed in (("no_proxy", lower if lower is not None else upper), ("NO_PROXY", upper if upper is not None else lower)):
        hosts = [host.strip() for host in (listed or "").split(",") if host.strip()]
        if hosts != ["*"]:
            environment[name] = ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
