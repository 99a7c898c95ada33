"""Tests do not depend on whose machine this is: on AWS settings, proxies, clusters and tokens of the user's.

Ray gets a token of the tests' own, so that neither the user's clusters nor their token file are touched.
"""

import os
import tempfile
from pathlib import Path

from freeguide.configs.loopback import reach_loopback_directly

_folder = tempfile.TemporaryDirectory(prefix="freeguide-tests-")
_token = Path(_folder.name) / "token"
_token.write_text("0123456789abcdef0123456789abcdef")
# Ray reads these when it is imported, which a test module may do before any fixture runs.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token), "RAY_USAGE_STATS_ENABLED": "0"}

if not os.environ.get("FREEGUIDE_TEST_S3"):  # else the settings are those of a server to be tested against
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
    os.environ.pop(name, None)
reach_loopback_directly()
