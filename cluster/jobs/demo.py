"""`freeguide demo`: the main job on real handwritten digits, with an S3 server of its own.

The server (moto's) is a thread that keeps objects in memory; another copies them to `runs/.s3`, and the next demo puts them
back. So a second demo, or one after an interruption, goes on where the first one stopped. All commands run in this one process:
whatever ends it, no server stays behind. Nothing of the user's AWS settings is read, unless both locations are given on a store.
"""

import contextlib
import fcntl
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from freeguide.cluster.runtime.checks import contradictions
from freeguide.configs.errors import UserError
from freeguide.configs.load import PACKAGED, load_config
from freeguide.configs.loopback import reach_loopback_directly
from freeguide.configs.secrets import masked
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.data_pipeline.store.open import create_bucket, open_store
from freeguide.data_pipeline.store.unfinished import TEMP

CONFIG = PACKAGED / "digits.yaml"
COMMANDS = ("prepare", "train", "evaluate")
BUCKET = "s3://freeguide"
KEPT = Path("runs") / ".s3"


def demo(overrides: list[str], run: Callable[[list[str]], int]) -> int:
    """Prepare, train and evaluate `configs/digits.yaml`, each with `run`, the command line.

    Returns the exit code of the first command that fails, or 0. Raises UserError for locations of which only one is on the
    user's store, and if another demo is using the folder.
    """
    began = time.monotonic()
    for command in COMMANDS:
        load_config(CONFIG, overrides, command, contradictions=contradictions)  # refused here, before anything is begun
    with contextlib.nullcontext() if _on_own_store(overrides) else local_s3(KEPT) as endpoint:
        if endpoint:
            print(f"S3 server of the demo: {endpoint}, kept in {KEPT}", flush=True)
        for command in COMMANDS:
            print(f"\n$ {masked(shlex.join(['freeguide', command, os.path.relpath(CONFIG), *overrides]))}", flush=True)
            if code := run([command, str(CONFIG), *overrides]):
                return code
    print(f"demo done in {timedelta(seconds=round(time.monotonic() - began))}")
    return 0


def _on_own_store(overrides: list[str]) -> bool:
    """Whether `data.uri` and `run` are both given and both on S3: then the environment of the user counts, as it is."""
    config = load_config(CONFIG, overrides)
    given = {override.partition("=")[0] for override in overrides}
    places = {"data.uri": config.data.uri, "run": config.run}
    if all(name in given and uri.startswith("s3://") for name, uri in places.items()):
        return True
    for name, uri in places.items():
        if uri.startswith("s3://") and not f"{uri}/".startswith(f"{BUCKET}/"):
            raise UserError(f"{name}={uri} is not on the demo's own server; give both data.uri and run on your store, or neither")
    return False


def environment(of: Mapping[str, str], endpoint: str) -> dict[str, str]:
    """The environment `of` a user for the demo: its S3 server in place of all that botocore could find, on this machine alone."""
    ours = {name: value for name, value in of.items() if not name.startswith("AWS_") and name != "RAY_ADDRESS"} | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    reach_loopback_directly(ours)
    return ours


@contextmanager
def local_s3(folder: Path) -> Iterator[str]:
    """moto's S3 server on a free loopback port, and the `environment` for it. It has the objects of `folder`, which follows it.

    Raises UserError if the folder cannot be used, or if another demo is using it.
    """
    from moto.server import ThreadedMotoServer

    kept = open_store(str(folder))
    kept.check()
    with contextlib.ExitStack() as stack:
        _claim(folder, stack)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        stack.callback(server.stop)
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        stack.enter_context(_exchanged(environment(os.environ, endpoint)))
        create_bucket(BUCKET)
        live = open_store(BUCKET)
        _mirror(kept, live, {})
        stack.enter_context(_following(live, kept))
        yield endpoint


def _claim(folder: Path, stack: contextlib.ExitStack) -> None:
    """Keep other demos out of `folder` until the stack is closed or the process ends, and clear away what a killed one left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.rglob(f"{TEMP}*"):
            left.unlink()
    except BlockingIOError as error:
        raise UserError(f"another demo is using {folder.absolute()}; wait for it, or run this one in another folder") from error
    except OSError as error:
        raise UserError(f"{folder.absolute()} cannot be used ({error.strerror}); run the demo in a folder of your own") from error


@contextmanager
def _exchanged(wanted: dict[str, str]) -> Iterator[None]:
    """`wanted` as the environment of this process and its children."""
    before = dict(os.environ)
    _become(wanted)
    try:
        yield
    finally:
        _become(before)


def _become(wanted: dict[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


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
            with contextlib.suppress(MissingObject):  # deleted since it was listed
                target.put(info.key, source.get(info.key))
                seen[info.key] = info.etag
    for key in sorted(seen.keys() - {info.key for info in present}, key=lambda k: not k.endswith("manifest.json")):
        target.delete(key)
        del seen[key]
