"""The clients of S3, one for each process and endpoint; and every name of boto3 and botocore that they do not promise to keep.

Endpoint, credentials and all else that is not set here are botocore's own business: the environment, the AWS config file, profiles,
roles.
"""

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import boto3
import botocore
import botocore.config
import botocore.configprovider
from botocore.parsers import ResponseParserError as ResponseParserError  # not among botocore.exceptions

from freeguide.configs.errors import StoreError
from freeguide.configs.loopback import reach_loopback_directly
from freeguide.data_pipeline.store.base import Retry

SURROUNDINGS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_REGION")


@dataclass(frozen=True)
class Terms:
    """What a client depends on: another process, as after a fork, or another endpoint needs another client."""

    retry: Retry
    unsigned: bool
    by_arn: bool  # whether the bucket is named by an ARN
    process: int = field(default_factory=os.getpid)
    surroundings: tuple[str | None, ...] = field(default_factory=lambda: tuple(map(os.environ.get, SURROUNDINGS)))


_clients: dict[Terms, Any] = {}
_anonymous: set[Terms] = set()  # clients that have found no credentials
_lock = threading.Lock()


def client(terms: Terms, uri: str, before_parsing: Callable[..., None]) -> Any:
    """This process's client; made on first use. `before_parsing` sees each answer before botocore does, see `refuse_strangers`.

    Raises StoreError if botocore refuses its own configuration.
    """
    with _lock:
        if terms not in _clients:
            reach_loopback_directly()  # in a worker too, whose node has an environment of its own
            session = boto3.session.Session()
            nobody = not terms.unsigned and session.get_credentials() is None
            if nobody:
                print(f"no AWS credentials are found: {uri} is read without, as public data", file=sys.stderr, flush=True)
                _anonymous.add(terms)
            config = _configuration(session, terms, terms.unsigned or nobody)
            try:
                made = session.client("s3", config=config)
            except ValueError as error:
                raise StoreError(
                    f"The AWS configuration for {uri} cannot be used ({str(error).rstrip('.')}); correct it"
                ) from error
            made.meta.events.register("before-parse.s3", before_parsing)
            _clients[terms] = made
        return _clients[terms]


def drop_client(terms: Terms) -> None:
    """The next request makes another session, which asks botocore's whole provider chain for credentials again."""
    with _lock:
        _clients.pop(terms, None)
        _anonymous.discard(terms)


def is_anonymous(terms: Terms) -> bool:
    """Whether requests go without credentials."""
    return terms.unsigned or terms in _anonymous


def reader_of(body: Any) -> Callable[[int], bytes]:
    """Reads at most so many bytes of an object's body, and returns what has arrived.

    botocore's own `read` waits for all of them: a body that drips could hold us for hours inside one large read.
    """
    read: Callable[[int], bytes] = getattr(body._raw_stream, "read1", body.read)
    return read


def _configuration(session: Any, terms: Terms, unsigned: bool) -> botocore.config.Config:
    """What we need to have our way in; all else, and whatever the user's own configuration says, stays as it is."""
    core = session._session
    profile = core.get_scoped_config()
    endpoint = botocore.configprovider.ConfiguredEndpointProvider(core.full_config, profile, "s3").provide()
    options: dict[str, Any] = {}
    s3 = profile.get("s3")
    styled = isinstance(s3, dict) and ("addressing_style" in s3 or "use_accelerate_endpoint" in s3)
    if endpoint and not styled and not terms.by_arn:
        options["s3"] = {"addressing_style": "path"}  # loopback and house servers have no host name per bucket
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        if name not in profile and f"AWS_{name.upper()}" not in os.environ:
            options[name] = "when_required"  # older servers do not know the newer headers
    if unsigned:
        options["signature_version"] = botocore.UNSIGNED
    return botocore.config.Config(
        connect_timeout=terms.retry.connect_s,
        read_timeout=terms.retry.read_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=64,
        **options,
    )
