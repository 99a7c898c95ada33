"""`python -m cluster COMMAND ...` is `freeguide COMMAND ...`, with nothing installed but the requirements."""

import sys

from cluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
