"""Ray of the tests: a token of their own, so that neither the user's clusters nor their token file are touched."""

import os
import tempfile
from pathlib import Path

_folder = tempfile.TemporaryDirectory(prefix="freeguide-tests-")
_token = Path(_folder.name) / "token"
_token.write_text("0123456789abcdef0123456789abcdef")
# Ray reads these when it is imported, which a test module may do before any fixture runs.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token), "RAY_USAGE_STATS_ENABLED": "0"}
