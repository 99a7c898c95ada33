"""The head that RAY_ADDRESS names: whether a server of Ray answers there, and whether it takes the user's token."""

import os
import socket
import urllib.parse

import grpc
from ray._private import services
from ray._private.authentication import authentication_token_setup
from ray.exceptions import AuthenticationError

from freeguide.cluster.runtime.submit import essence, token_sentence
from freeguide.configs.errors import ConfigError, UserError

_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # a question that any head answers
_HANDSHAKE = 10.0  # seconds that a server of gRPC may take to say that it is one


def probe(address: str) -> None:
    """Raise ConfigError where no server of Ray answers at `address`: Ray itself would try for minutes, with a line for each try."""
    client, here = address.startswith("ray://"), f"RAY_ADDRESS={address}"
    give = "start one, or unset RAY_ADDRESS to use this machine"
    if address == "auto":
        address = services.find_bootstrap_address(None) or next(iter(services.find_gcs_addresses()), "")
        if not address:
            raise ConfigError(f"{here}: no Ray cluster runs on this machine; {give}")
    try:
        parts = urllib.parse.urlsplit(address if client else f"//{address}")
        host, port = parts.hostname, parts.port or (10001 if client else 0)
    except ValueError as error:
        raise ConfigError(
            f"{here}: no address of a Ray cluster ({error}); give HEAD:6379, or unset it to use this machine"
        ) from error
    if not host or not port or parts.path.strip("/"):
        raise ConfigError(f"{here}: no address of a Ray cluster; give HEAD:6379, or unset it to use this machine")
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"{here}: no Ray cluster answers there ({error}); {give}") from error
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(_HANDSHAKE)
        except grpc.FutureTimeoutError as error:
            raise ConfigError(f"{here}: another server than Ray's answers there; give the head's port, mostly 6379") from error
        if not client and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
            _check_token(channel, address)


def _check_token(channel: grpc.Channel, address: str) -> None:
    """Raise UserError if the head wants another token than ours: Ray would try for half a minute, and then say less.

    A head that wants one gets the user's: without RAY_AUTH_MODE, Ray would send none.
    """

    def lets_in(**token: str) -> bool:
        try:
            channel.unary_unary(_ALIVE)(b"", timeout=_HANDSHAKE, metadata=[*token.items()])
        except grpc.RpcError as error:
            return bool(error.code() != grpc.StatusCode.UNAUTHENTICATED)  # whatever else it is, Ray says it better
        return True

    if lets_in():
        return
    if "RAY_AUTH_MODE" not in os.environ:
        authentication_token_setup._enable_token_auth()
    try:
        token = authentication_token_setup.AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True)
    except AuthenticationError as error:
        raise UserError(f"the token for the cluster at {address} cannot be read ({essence(str(error))}); mend it") from error
    if os.environ["RAY_AUTH_MODE"].lower() != "token" or not token or not lets_in(authorization=f"Bearer {token}"):
        raise UserError(token_sentence(address, "Authentication failed" if token else ""))
