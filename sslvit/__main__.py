"""`python -m sslvit` and `torchrun -m sslvit`: the same as the command `sslvit`."""

import sys

from sslvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
