"""``python -m uctrans`` is the ``uctrans`` command."""

import sys

from uctrans.cli import main

sys.exit(main())
