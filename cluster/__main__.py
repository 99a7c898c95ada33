"""`python -m cluster COMMAND ...` is `freeguide COMMAND ...`, with nothing installed but the requirements."""

from freeguide.cluster.cli import run

if __name__ == "__main__":
    run()
