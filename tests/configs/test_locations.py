"""Tests of locations.py: exactly the right place, or one sentence; never another place."""

import os
from pathlib import Path

import pytest

from freeguide.configs.errors import StoreError
from freeguide.configs.locations import Location, locate

POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint"
RIGHT = {
    "s3://bucket": ("bucket", ""),
    "s3://bucket/": ("bucket", ""),
    "s3://bucket/x/y": ("bucket", "x/y"),
    "s3://bucket/x/": ("bucket", "x"),
    "S3://bucket/x": ("bucket", "x"),
    "s3://bucket/x?y": ("bucket", "x?y"),
    "s3://bucket/x#y": ("bucket", "x#y"),
    "s3://bucket/x%20y z": ("bucket", "x%20y z"),
    "s3://bucket/a:b@c": ("bucket", "a:b@c"),
    f"s3://{POINT}/data/x/y": (f"{POINT}/data", "x/y"),
    f"s3://{POINT}:data/x/y": (f"{POINT}:data", "x/y"),
    f"s3://{POINT}/data": (f"{POINT}/data", ""),
    "s3://arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/data/x": (
        "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/data",
        "x",
    ),
    "s3://arn:aws:s3::123456789012:accesspoint/m.mrap/x": ("arn:aws:s3::123456789012:accesspoint/m.mrap", "x"),
    "file:///x%20y": ("", "/x y"),
    "file:///x": ("", "/x"),
    "file:/x": ("", "/x"),
    "file://localhost/x": ("", "/x"),
    "FILE:///%C3%A9%3F": ("", "/é?"),
    "file:////x": ("", "/x"),
    "//x/y": ("", "/x/y"),
    "/x/./y//z/": ("", "/x/y/z"),
    "/x?y#z": ("", "/x?y#z"),
    "/x\u200cy": ("", "/x\u200cy"),  # a joiner of Persian words: nothing to be seen, and nothing wrong
}


@pytest.mark.parametrize("uri", RIGHT)
def test_the_right_place(uri: str) -> None:
    bucket, path = RIGHT[uri]
    assert locate(uri) == Location(path, bucket)
    assert locate(locate(uri).uri) == locate(uri)


WRONG = {
    "": "empty",
    "s3://": "names no bucket",
    "s3:///x": "names no bucket",
    "s3://b/x": "names no bucket: 'b'",
    "s3://[b/x": r"names no bucket: '\[b'",
    "s3://user:key@bucket/x": "names no bucket",
    "s3://bucket?y/x": r"names no bucket: 'bucket\?y'",
    "s3://bucket#y/x": "names no bucket",
    "s3://-bucket/x": "names no bucket",
    "s3://bücket/x": "names no bucket",
    "s3://bucket//x": "empty part",
    "s3://bucket//": "empty part",
    "s3://bucket/x//": "empty part",
    "s3://bucket/../x": "empty part, '.' or '..'",
    "s3://bucket/./x": "empty part, '.' or '..'",
    "s3://bucket/x\\y": "backslash",
    "s3:/bucket/x": "no // after s3:",
    "s3:bucket/x": "no // after s3:",
    f"s3://{POINT}/": "names no access point",
    "s3://arn:aws:s3:eu-west-1:12:accesspoint/data/x": "names no access point",
    "s3://arn:aws:s3:::bucket/x": "names no access point",
    "file://x": "as the machine",
    "file://server/x": "'server' as the machine",
    "file:x": "as the machine",
    "file:///x?y": "a [?] or a #",
    "file:///x#y": "a [?] or a #",
    "file:///%ff": "not UTF-8",
    "file:///a%00b": "control characters",
    "file:///a%0Ab": "control characters",
    "http://host/x": "unknown scheme http:",
    "gs://bucket/x": "unknown scheme gs:",
    "s3a://bucket/x": "unknown scheme s3a:",
    "C:\\x": "path of Windows",
    "C:/x": "path of Windows",
    "\\\\server\\x": "path of Windows",
    "~nouser-at-all/x": "no such user's home",
    "/x\ny": "line breaks",
    "s3://bucket/x\ny": "line breaks",
    "/x\0y": "control characters",
    "/x\udcffy": "bytes that are no text",
    " s3://bucket/x": "spaces around it",
    "s3://bucket/x ": "spaces around it",
}


@pytest.mark.parametrize("uri", WRONG)
def test_one_sentence(uri: str) -> None:
    with pytest.raises(StoreError, match=WRONG[uri]) as caught:
        locate(uri)
    text = str(caught.value)
    assert not text.endswith(".")
    assert text.isprintable()


def test_relative_folders_begin_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = os.getcwd()
    assert locate("x/y").path == f"{here}/x/y"
    assert locate("./C:/x").path == f"{here}/C:/x"
    assert locate("~/x").path == f"{tmp_path}/home/x"
    assert locate("./~/x").path == f"{here}/~/x"
    assert locate("deep/../x").path == f"{here}/x"
    assert locate("link/x").path == f"{here}/link/x"
    assert locate("link/../x").path == f"{os.path.realpath(here)}/deep/x"  # as the machine reads it, not as the text looks


def test_a_working_folder_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")
    with pytest.raises(StoreError, match="working folder, which is gone"):
        locate("x")
