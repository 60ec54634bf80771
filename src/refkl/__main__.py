"""`python -m refkl …`, and what `accelerate launch -m refkl …` and `deepspeed --module refkl …` start."""

import sys

from refkl.cli import main

if __name__ == "__main__":
    sys.exit(main())
