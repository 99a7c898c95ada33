"""`python -m trainer CONFIG.yaml key=value ...`: train without Ray, alone or under torchrun.

It saves and leaves when it is asked to: with exit code 143 by SIGTERM, with 130 by Ctrl-C. A second Ctrl-C, or one before the first
step, ends it at once; the same command goes on from what is saved.
"""

import contextlib
import os
import signal
import sys
from typing import Any

from freeguide.configs.errors import UserError, visible
from freeguide.configs.load import load_config
from freeguide.trainer.checks import contradictions
from freeguide.trainer.training.failures import Terminated
from freeguide.trainer.training.loop import train

INTERRUPTED = 128 + signal.SIGINT


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python -m trainer CONFIG.yaml key=value ...", file=sys.stderr)
        return 2
    terminated, interrupted = Terminated(), False

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        if interrupted or not terminated.heard:
            _say("stopped; run the same command again to go on")
            os._exit(INTERRUPTED)  # threads may wait for other ranks
        interrupted = True
        _say("stopping after this step; Ctrl-C again ends it at once")
        terminated.ask()

    signal.signal(signal.SIGINT, interrupt)
    try:
        train(load_config(sys.argv[1], sys.argv[2:], contradictions=contradictions), terminated)
    except UserError as error:
        print(f"freeguide: error: {visible(str(error))}", file=sys.stderr)
        return 2
    except SystemExit as end:
        if not interrupted:
            raise
        _say("stopped; run the same command again to go on")
        return INTERRUPTED if end.code else 0
    return 0


def _say(words: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{words}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
