"""``python -m epcomm``, and the ``epcomm`` program."""

import sys

from epcomm.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
