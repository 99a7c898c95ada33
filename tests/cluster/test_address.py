"""The head that RAY_ADDRESS names, and its token."""

import concurrent.futures
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from freeguide.cluster.runtime import address as module
from freeguide.cluster.runtime.address import probe
from freeguide.configs.errors import ConfigError

WRONG = {
    "HEAD": "no address of a Ray cluster; give HEAD:6379",
    "head:x": "no address of a Ray cluster .Port could not be cast",
    "head:99999": "no address of a Ray cluster .Port out of range",
    "http://127.0.0.1:8265": "no address of a Ray cluster",
    ":6379": "no address of a Ray cluster",
    "[::1": "no address of a Ray cluster .Invalid IPv6",
    "127.0.0.1:1": "no Ray cluster answers there .*; start one, or unset",
    "[::1]:1": "no Ray cluster answers there .*; start one, or unset",
    "ray://127.0.0.1:1": "no Ray cluster answers there .*; start one, or unset",
    "no-such-host.invalid:6379": "no Ray cluster answers there .*; start one, or unset",
}


@pytest.mark.parametrize("address", WRONG)
def test_an_address_where_no_cluster_answers_is_one_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[address]) as caught:
        probe(address)
    assert str(caught.value).startswith(f"RAY_ADDRESS={address}: ")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_another_server_than_rays_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(module, "_HANDSHAKE", 0.5)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(ConfigError, match="another server than Ray's answers there; give the head's port, mostly 6379"):
        probe(f"{scheme}127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


def test_a_server_of_grpc_is_taken_for_rays() -> None:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    probe(f"127.0.0.1:{port}")
    server.stop(None)


class Guard(grpc.GenericRpcHandler):
    """A head that wants a token: what else it is asked, it does not know."""

    def __init__(self, token: str) -> None:
        self.wanted = ("authorization", f"Bearer {token}")

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        let_in = self.wanted in [tuple(item) for item in details.invocation_metadata]
        code = grpc.StatusCode.UNIMPLEMENTED if let_in else grpc.StatusCode.UNAUTHENTICATED
        return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, ""))


TOKEN = "0123456789abcdef" * 2
GUARDED: list[tuple[dict[str, str], str]] = [
    ({"RAY_AUTH_TOKEN": TOKEN}, "let in with mode token"),
    ({"RAY_AUTH_TOKEN": "f" * 32}, "does not take the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN"),
    ({}, "wants a token, and there is none here; set RAY_AUTH_TOKEN"),
    ({"RAY_AUTH_MODE": "disabled"}, "wants a token, and RAY_AUTH_MODE=disabled sends none; unset it"),
    ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "cannot be read"),
]
ASK = """
import json, os, sys, ray
from freeguide.cluster.runtime import address
from freeguide.configs.errors import UserError
address.services.find_bootstrap_address = lambda _: sys.argv[1]
for number, (settings, _) in enumerate(json.loads(sys.argv[2])):
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        del os.environ[name]
    os.environ |= settings
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    try:
        address.probe("auto" if number % 2 else sys.argv[1])
        print("let in with mode", os.environ["RAY_AUTH_MODE"])
    except UserError as error:
        print(error)
"""


def test_a_head_that_wants_a_token_gets_the_users_or_a_sentence_at_once(tmp_path: Path) -> None:
    """Ray itself tries a wrong token for half a minute. In a process of its own, as Ray keeps its mode and token."""
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Guard(TOKEN),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": "."}
    words = [sys.executable, "-c", ASK, address, json.dumps(GUARDED)]
    ended = subprocess.run(words, cwd=Path(__file__).parents[2], env=clean, capture_output=True, text=True, timeout=100)
    server.stop(None)
    said = ended.stdout.splitlines()
    assert len(said) == len(GUARDED), ended.stdout + ended.stderr
    assert [sentence for (_, sentence), line in zip(GUARDED, said, strict=True) if sentence not in line] == [], said


def test_no_cluster_on_this_machine_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.services, "find_bootstrap_address", lambda _: None)
    monkeypatch.setattr(module.services, "find_gcs_addresses", lambda: [])
    with pytest.raises(ConfigError, match="RAY_ADDRESS=auto: no Ray cluster runs on this machine; start one, or unset"):
        probe("auto")
