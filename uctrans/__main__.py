"""``python -m uctrans`` is the ``uctrans`` command."""

import sys

from .cli import main

sys.exit(main())
