import sys

from playground.comparison.command import main

sys.exit(main())
