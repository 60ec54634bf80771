"""Entry point of `python -m refkl …`, `accelerate launch -m refkl …` and `deepspeed --module refkl …`."""

import sys

if __name__ == "__main__":
    try:
        from refkl.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # before main, or as it returns
        sys.exit(130)
