"""``python -m playground.comparison``: run, continue and report the comparison of all recipes."""

import sys

from playground.comparison.command import main

if __name__ == "__main__":
    sys.exit(main())
