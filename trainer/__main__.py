"""`python -m trainer CONFIG.yaml key=value ...`: train without Ray, alone or under torchrun."""

import sys

from configs.errors import UserError, visible
from configs.load import load_config
from trainer.loop import train


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python -m trainer CONFIG.yaml key=value ...", file=sys.stderr)
        return 2
    try:
        train(load_config(sys.argv[1], sys.argv[2:]))
    except UserError as error:
        print(f"freeguide: error: {visible(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
