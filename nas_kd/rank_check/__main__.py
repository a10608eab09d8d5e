"""`python -m nas_kd.rank_check`."""

import sys

from nas_kd.rank_check import main

sys.exit(main())
