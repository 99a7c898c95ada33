"""What must not be seen: passwords, tokens and keys inside texts that are printed, logged or stored.

Every `UserError` and every config that is shown passes through here. A name or a shape gives a secret away; what neither shows
cannot be known, so a secret belongs into an environment variable of the nodes, or into `${oc.env:NAME}`, which is shown as it is
written.
"""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_WORDS = (
    r"(?:secret|passw(?:or)?d|passphrase|credential|token(?!iz)|api_?key|access_?key|private_?key)(?![\w-]*(?:path|file|dir)\b)"
)
# Of environment variables and of the keys of mappings.
_NAME = re.compile(rf"(?i){_WORDS}|(?:^|[_.-])(?:key|pwd|pat|auth|authorization|cookie)(?:$|[_.-](?!path|file|dir))|key$")
_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(
    rf"(?i)(?<=[?&;])((?:x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|signature|sig|key|auth|pwd|"
    rf"[\w.-]*{_WORDS}[\w.-]*)=)[^&#\s'\"]+"
)
_SET = re.compile(rf"(?i)((?<![\w?&;.-])[\w.-]*{_WORDS}[\w-]*=)[^\s'\",;]+")  # HF_TOKEN=..., and as an override
_HEADER = re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}")
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{16}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|hf_[A-Za-z0-9]{16,}|npm_[A-Za-z0-9]{20,}|sk-[\w-]{16,}|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w.-]{10,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)
# AWS's secret keys have no mark of their own: 40 characters of base64, of all kinds, that are no path.
_AWS = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[A-Za-z0-9+][A-Za-z0-9/+]{39}")


def masked(text: str) -> str:
    """The text without the credentials of URLs, the values of secret names, and what has the shape of a known kind of key."""
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _SET.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def masked_values(value: Any, name: str = "") -> Any:
    """A tree of mappings, lists and values without secrets, those under secret names included."""
    if isinstance(value, Mapping):
        return {masked(str(key)) if isinstance(key, str) else key: masked_values(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(each, name) for each in value]
    if not isinstance(value, str) or not value:
        return value
    secret = "${" not in value and (_NAME.search(name) or _AWS.fullmatch(value))
    return HIDDEN if secret else masked(value)
