"""`python -m fastdit`: the command line."""

import sys

from fastdit.cli import main

sys.exit(main())
