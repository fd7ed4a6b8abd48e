"""``python -m playground.study``: run the study, go on with it, and report what is there."""

import sys

from playground.study.command import main

if __name__ == "__main__":
    sys.exit(main())
