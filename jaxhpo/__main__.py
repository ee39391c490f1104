"""``python -m jaxhpo``: the command line."""

import sys

from jaxhpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
