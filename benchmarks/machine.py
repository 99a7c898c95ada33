"""What a measurement was made on, for the table that it prints."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str) -> dict[str, str]:
    """Processor, load, date, the commit of this checkout, and the versions of Python and `packages`."""
    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {
        "hardware": f"{os.cpu_count()} x {models[0] if models else platform.processor()}{load}",
        "commit": git.stdout.strip() or "not a checkout",
        "date": time.strftime("%Y-%m-%d"),
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]),
    }
