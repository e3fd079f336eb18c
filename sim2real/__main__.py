"""`python -m sim2real`."""

import sys

from sim2real.cli import main

sys.exit(main())
