"""Entry point of `python -m refkl …`, `accelerate launch -m refkl …` and `deepspeed --module refkl …`."""

import sys

from refkl.cli import main

if __name__ == "__main__":
    sys.exit(main())
