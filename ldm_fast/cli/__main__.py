"""`python -m ldm_fast.cli` is `ldm-fast`, for systems on which that script is not on the path."""

import sys

from ldm_fast.cli import main

sys.exit(main())
