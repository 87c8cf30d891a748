"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis_profiles  # noqa: F401 - importing it loads the profile
import pytest

from tensorstore_fmt.testing.servers import S3Server, serve_s3

pytest_plugins = ["support.goals", "support.kernels"]


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A moto server with one bucket, the same for all tests: use keys of your own."""
    with serve_s3() as server:
        yield server
