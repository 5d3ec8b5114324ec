"""`python -m loopwright`: the command `loopwright`."""

import sys

from .framework.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
