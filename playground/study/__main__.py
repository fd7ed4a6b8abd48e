"""``python -m playground.study``: run, continue and report the study."""

import sys

from playground.study.command import main

if __name__ == "__main__":
    sys.exit(main())
