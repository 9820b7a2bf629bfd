"""`python -m ctc_drafter.cli`: the `ctc-drafter` command."""

import sys

from ctc_drafter.cli import main

if __name__ == "__main__":
    sys.exit(main())
