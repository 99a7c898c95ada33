"""`freeguide demo`: the main job on real handwritten digits, with an S3 server of its own where none is configured.

The server (moto's) keeps objects in memory; a thread copies them to `runs/.s3`, and the next demo puts them back. So a second
demo, or one after an interruption, goes on where the first one stopped.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from configs.errors import UserError
from data_pipeline.store import Store, create_bucket, open_store

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"
BUCKET = "s3://freeguide"
KEPT = Path("runs") / ".s3"
_REAL = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)


def demo(overrides: list[str]) -> int:
    """Prepare, train and evaluate `configs/digits.yaml`; returns the exit code of the first command that fails, or 0."""
    began = time.monotonic()
    configured = next((name for name in _REAL if name in os.environ), None)
    if configured:
        print(f"using the S3 of your environment ({configured} is set)", flush=True)
        code = _commands(overrides)
    else:
        with local_s3(KEPT) as endpoint:
            print(f"S3 server of the demo: {endpoint}, kept in {KEPT}", flush=True)
            code = _commands(overrides)
    if code == 0:
        print(f"demo done in {timedelta(seconds=round(time.monotonic() - began))}")
    return code


def _commands(overrides: list[str]) -> int:
    for command in ("prepare", "train", "evaluate"):
        print(f"\n$ freeguide {command} {os.path.relpath(CONFIG)} {' '.join(overrides)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "cluster", command, str(CONFIG), *overrides], check=False).returncode
        if code:
            return code
    return 0


@contextmanager
def local_s3(folder: Path) -> Iterator[str]:
    """moto's S3 server on a free loopback port with the objects of `folder`, which follows its changes; sets AWS_* for children."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    ours = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        create_bucket(BUCKET)
        kept, live = open_store(str(folder)), open_store(BUCKET)
        folder.mkdir(parents=True, exist_ok=True)
        _mirror(kept, live, {})
        with _following(live, kept):
            yield endpoint
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def _following(source: Store, target: Store) -> Iterator[None]:
    """Copy what changes in `source` to `target`, every two seconds and at the end."""
    seen = {info.key: info.etag for info in source.list()}
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(2.0):
            try:
                _mirror(source, target, seen)
            except UserError as error:
                print(f"cannot keep the demo's objects: {error}", file=sys.stderr)

    thread = threading.Thread(target=follow, name="demo-mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _mirror(source, target, seen)


def _mirror(source: Store, target: Store, seen: dict[str, str]) -> None:
    """Make `target` hold what `source` holds; `seen` are the etags already copied. Manifests come last, as they were written."""
    present = source.list()
    for info in sorted(present, key=lambda i: (i.key.endswith("manifest.json"), i.key)):
        if seen.get(info.key) != info.etag:
            target.put(info.key, source.get(info.key))
            seen[info.key] = info.etag
    for key in sorted(seen.keys() - {info.key for info in present}, key=lambda k: not k.endswith("manifest.json")):
        target.delete(key)
        del seen[key]
