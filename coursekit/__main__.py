"""`python -m coursekit ...` is `coursekit ...`; so is `torchrun -m coursekit train NAME`."""

import sys

from coursekit.cli import main

sys.exit(main())
