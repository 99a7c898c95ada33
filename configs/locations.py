"""Where a location points: `s3://bucket/prefix`, `file:///folder` or a plain folder path, and nothing else.

A location means exactly one place, or it is refused in a sentence: nothing is dropped, joined or guessed. So the same text, made
absolute once where it is typed, means the same place on every machine.
"""

import os
import re
import unicodedata
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from freeguide.configs.errors import ConfigError, StoreError

GIVE = "give s3://bucket/prefix or a folder"

# What boto3 takes for the bucket: names, and access points by their ARN, which has a slash or a colon before the name.
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,253}[a-zA-Z0-9]")
_ARN = re.compile(
    r"arn:aws[a-z-]*:(?:s3|s3-object-lambda):[a-z0-9-]*:\d{12}:accesspoint[/:][a-zA-Z0-9.-]{1,63}"
    r"|arn:aws[a-z-]*:s3-outposts:[a-z0-9-]+:\d{12}:outpost[/:][a-zA-Z0-9-]{1,63}[/:]accesspoint[/:][a-zA-Z0-9-]{1,63}"
)
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):(?=/)|(?i:(s3|file)):")
_SLIP = re.compile(r"(?i)(s3[an]?|gs|file|https?)[^/]?//")


@dataclass(frozen=True)
class Location:
    """A folder (absolute, `bucket` empty), or the keys under `path/` of a bucket."""

    path: str
    bucket: str = ""

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.path}".rstrip("/") if self.bucket else self.path


def locate(uri: str) -> Location:
    """The place that `uri` names; touches nothing but the links on the way of a path with `..`. Raises StoreError."""
    if not uri:
        raise StoreError(f"A location is empty; {GIVE}.")
    if _hidden(uri) or uri != uri.strip():
        raise StoreError(
            f"The location {uri!r} has line breaks, control characters, bytes that are no text, or spaces around it; {GIVE}."
        )
    scheme = _SCHEME.match(uri)
    if scheme is None and _SLIP.match(uri):
        raise StoreError(f"{uri} looks like a URI without the colon before its slashes; {GIVE} (./{uri} if it is one)")
    if scheme is None:
        return _folder(uri, uri)
    name, rest = scheme[0][:-1].lower(), uri[scheme.end() :]
    if name == "file":
        return _file(uri, rest)
    if len(name) == 1:
        raise StoreError(f"{uri} is a path of Windows; {GIVE} of this machine.")
    if name != "s3":
        raise StoreError(f"{uri} has the unknown scheme {name}:; {GIVE} (./{uri} if it is one).")
    if not rest.startswith("//"):
        raise StoreError(f"{uri} has no // after s3:; give s3://bucket/prefix.")
    return _s3(uri, rest[2:])


def check_target(option: str, path: str) -> None:
    """Raises ConfigError if no file can be written at `path`, before what is to be written is made."""
    place = Path(path)
    if not path or place.is_dir() or not place.parent.is_dir():
        raise ConfigError(f"{option} {path!r} is no file in a folder that exists; give the path of a file")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise ConfigError(f"{option} {path!r} may not be written; give a path in a folder of yours")


def _s3(uri: str, rest: str) -> Location:
    arn = _ARN.match(rest)
    if rest.startswith("arn:"):
        if arn is None or rest[arn.end() : arn.end() + 1] not in ("", "/"):
            raise StoreError(f"{uri} names no access point; give s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/prefix.")
        bucket, path = rest[: arn.end()], rest[arn.end() + 1 :]
    else:
        bucket, _, path = rest.partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise StoreError(
                f"{uri} names no bucket: {bucket!r} is not made of 3 or more letters, digits, dots and hyphens; give s3://bucket/prefix."
            )
    parts = path.split("/")
    if not parts[-1]:
        del parts[-1]  # one slash at the end is the habit of many, and means the same keys
    if any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{uri} has an empty part, '.' or '..' between its slashes; give s3://bucket/prefix without them.")
    if "\\" in path:
        raise StoreError(f"{uri} has a backslash; give s3://bucket/prefix with slashes.")
    return Location("/".join(parts), bucket)


def _file(uri: str, rest: str) -> Location:
    """RFC 8089: file:/path or file:///path, percent-encoded, of this machine."""
    host, path = "", rest
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        path = slash + path
    if host.lower() not in ("", "localhost") or not path.startswith("/"):
        raise StoreError(f"{uri} names {host or 'no'!r} as the machine of the folder; give file:///folder, or the folder's path.")
    if "?" in path or "#" in path:
        raise StoreError(f"{uri} has a ? or a #; write them as %3F and %23, or give the folder's path.")
    try:
        path = urllib.parse.unquote_to_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise StoreError(f"{uri} is not UTF-8 behind its percent signs; give the folder's path.") from error
    if _hidden(path):
        raise StoreError(f"{uri} has line breaks or control characters behind its percent signs; {GIVE}.")
    return _folder(uri, "/" + path.lstrip("/"))


def _folder(uri: str, path: str) -> Location:
    if re.match(r"[a-zA-Z]:\\|\\\\", path):
        raise StoreError(f"{uri} is a path of Windows; {GIVE} of this machine.")
    if path.startswith("~") and uri == path:
        path = os.path.expanduser(path)
        if path.startswith("~"):
            raise StoreError(f"{uri}: there is no such user's home; {GIVE} (./{uri} if it is one).")
    try:
        place = os.path.abspath(path)
    except OSError as error:
        raise StoreError(
            f"{uri} begins in the working folder, which is gone; go to one that exists, or give a whole path."
        ) from error
    if ".." in path.split("/") and os.path.realpath(path) != os.path.realpath(place):
        place = os.path.realpath(path)  # behind a link, '..' is where the link points, not where it stands
    return Location("/" + place.lstrip("/"))


def _hidden(text: str) -> bool:
    """Whether there are control characters, line breaks, or the stand-ins for bytes that are not UTF-8."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)
