"""``tensorstore-fmt demo NAME``: real trainings into runs, and what can be seen of them.

Each demonstration is a package of its own here; what they share stands beside them.
"""

from typing import Final

__all__ = ["DEFAULT", "NAMES"]

NAMES: Final = ("attention", "curves", "digits")
"""The demonstrations, each a package here. Importing this imports none of them."""

DEFAULT: Final = "digits"
"""The one that ``tensorstore-fmt demo`` without a name gives."""
