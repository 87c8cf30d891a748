"""``python -m tensorstore_fmt``: the same as the command ``tensorstore-fmt``."""

from __future__ import annotations

import sys

from tensorstore_fmt.cli import main

if __name__ == "__main__":
    sys.exit(main())
