"""`python -m sidepath`."""

from __future__ import annotations

import sys

from sidepath.cli import main

sys.exit(main())
