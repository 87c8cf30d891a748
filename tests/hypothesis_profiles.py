"""Hypothesis profiles: ``quick`` (default), ``ci`` (where CI is set), ``long`` (at night).

``HYPOTHESIS_PROFILE=long python -m pytest`` picks one. Importing this module loads it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Shared machines stall now and then: no deadline for an example, the test has its timeout.
settings.register_profile("quick", deadline=None, max_examples=50)
settings.register_profile(
    "ci", parent=settings.get_profile("quick"), derandomize=True, print_blob=True
)
settings.register_profile(
    "long",
    parent=settings.get_profile("quick"),
    max_examples=5000,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "quick")
)
