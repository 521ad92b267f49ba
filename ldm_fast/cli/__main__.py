"""`python -m ldm_fast.cli`, for where the script `ldm-fast` is not on the path."""

import sys

from ldm_fast.cli import main

sys.exit(main())
