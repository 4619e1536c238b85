"""``python -m lmx`` is the command ``lmx``."""

import sys

from lmx.cli import main

sys.exit(main())
