"""A real S3 server for one command: Ceph's radosgw over a monitor and a store in memory, all on loopback.

    python -m tests.faults.radosgw_s3 pytest tests/data_pipeline tests/faults

runs the command with FREEGUIDE_TEST_S3, AWS_ENDPOINT_URL and credentials set, and ends with its exit code. Without a command it
serves until it is interrupted. It needs Debian's or Ubuntu's packages radosgw, ceph-mon and ceph-osd, and installs them where it
may (root, apt-get). Everything lives in a temporary folder; what was started is stopped, and nothing else.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool")
CONFIG = """[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
# without authentication radosgw still insists on being asked for one of these by name
ms mon client mode = crc secure
ms mon service mode = crc secure
ms mon cluster mode = crc secure
# one copy on one disk, which a careful Ceph would refuse
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 2
# agreement of one monitor with itself need not wait
paxos propose interval = 0.05
paxos min wait = 0.01
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
log file = {folder}/$name.log
keyring = {folder}/keyring
[mon]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {store_bytes}
[client]
rgw override bucket index max shards = 1
rgw run sync thread = false
rgw enable usage log = false
rgw enable ops log = false
"""


def install() -> None:
    """Makes sure that Ceph's programs are there. Ends with a sentence where they are not and cannot be installed."""
    if all(map(shutil.which, PROGRAMS)):
        return
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        sys.exit("Ceph is missing: apt-get install radosgw ceph-mon ceph-osd (as root)")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = ["radosgw", "ceph-mon", "ceph-osd", "ceph-common"]
    for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *packages]):
        if subprocess.run([apt, *command], env=quiet, stdin=subprocess.DEVNULL).returncode:
            sys.exit(f"apt-get {command[0]} has failed, so Ceph is missing; see what it says above")


@contextmanager
def radosgw(store_bytes: int = 4 * 2**30) -> Iterator[dict[str, str]]:
    """The environment for clients of a fresh server (endpoint and credentials), which ends with the block."""
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="freeguide-ceph-") as name:
        folder = Path(name)
        try:
            yield _start(folder, started, store_bytes)
        except Exception:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-10:], sep="\n", file=sys.stderr)
            raise
        finally:
            for process in reversed(started):
                process.terminate()
            for process in reversed(started):
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _start(folder: Path, started: list["subprocess.Popen[bytes]"], store_bytes: int) -> dict[str, str]:
    fsid, osd, access, secret = str(uuid.uuid4()), str(uuid.uuid4()), secrets.token_hex(10), secrets.token_hex(20)
    v2, v1, port = _free_ports(3)
    conf, keys, monmap = str(folder / "ceph.conf"), str(folder / "keyring"), str(folder / "monmap")
    Path(conf).write_text(CONFIG.format(fsid=fsid, v2=v2, v1=v1, folder=folder, store_bytes=store_bytes))
    for part in ("mon", "osd"):
        (folder / part).mkdir()

    def run(program: str, *arguments: str) -> str:
        command = [program, "-c", conf, *arguments] if program not in ("ceph-authtool", "monmaptool") else [program, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def serve(program: str, *arguments: str) -> None:
        with open(folder / f"{program}.out.log", "wb") as log:
            started.append(subprocess.Popen([program, "-c", conf, "-f", *arguments], stdout=log, stderr=log))

    def up(what: str, answers: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not answers():
            if any(process.poll() is not None for process in started) or time.monotonic() > deadline:
                raise RuntimeError(f"{what} does not come up")
            time.sleep(0.1)

    run("ceph-authtool", keys, "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    run("ceph-authtool", keys, "--gen-key", "-n", "client.admin", "--cap", "mon", "allow *", "--cap", "osd", "allow *")
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]", monmap)
    run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keys)
    serve("ceph-mon", "-i", "a")
    up("the monitor", lambda: _listens(v2))
    run("ceph", "osd", "new", osd, "0")
    run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    serve("ceph-osd", "-i", "0")
    up("the store", lambda: "1 up" in run("ceph", "osd", "stat"))
    serve("radosgw", "-n", "client.admin", f"--rgw_frontends=beast endpoint=127.0.0.1:{port} tcp_nodelay=1")
    up("radosgw", lambda: _answers(f"http://127.0.0.1:{port}/"))
    run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", f"--access-key={access}", f"--secret-key={secret}")
    endpoint = f"http://127.0.0.1:{port}"
    return {
        "FREEGUIDE_TEST_S3": endpoint,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def main(command: list[str]) -> int:
    install()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped then too
    began = time.monotonic()
    with radosgw() as environment:
        print(f"radosgw at {environment['AWS_ENDPOINT_URL']}, up in {time.monotonic() - began:.1f} s", flush=True)
        if command:
            return subprocess.run(command, env={**os.environ, **environment}).returncode
        for name, value in environment.items():
            print(f"export {name}={value}", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
