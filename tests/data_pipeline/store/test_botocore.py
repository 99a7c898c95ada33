"""The names of boto3 and botocore that they do not promise to keep: a version that has lost one is told so here, by that name."""

import ast
import inspect
import io
from collections.abc import Callable
from pathlib import Path

import boto3
import botocore.configprovider
import botocore.parsers
import pytest
from botocore.response import StreamingBody

from freeguide.data_pipeline.store import s3_client

STORE = Path(s3_client.__file__).parent


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("Session._session.get_scoped_config", lambda: boto3.session.Session()._session.get_scoped_config(), {}),
        ("Session._session.full_config", lambda: sorted(boto3.session.Session()._session.full_config), ["profiles"]),
        (
            "ConfiguredEndpointProvider",
            lambda: parameters(botocore.configprovider.ConfiguredEndpointProvider)[:3],
            ["full_config", "scoped_config", "client_name"],
        ),
        ("StreamingBody._raw_stream", lambda: StreamingBody(io.BytesIO(b"abc"), 3)._raw_stream.read1(2), b"ab"),
        ("ResponseParserError", lambda: issubclass(botocore.parsers.ResponseParserError, Exception), True),
    ],
)
def test_botocore_still_has(
    name: str, found: Callable[[], object], expected: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    try:
        assert found() == expected
    except AttributeError as error:
        pytest.fail(f"botocore has no {name} any more ({error}): change store/s3_client.py, or its upper bound in pyproject.toml")


def test_only_one_file_knows_them() -> None:
    """A name with one underscore is private, and so are botocore's modules that its documentation does not list."""
    for path in sorted(STORE.glob("*.py")):
        tree = ast.parse(path.read_text())
        taken = [
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in ("_session", "_raw_stream", "configprovider", "parsers")
        ]
        assert bool(taken) == (path.name == "s3_client.py"), f"{path.name} uses {taken}"
