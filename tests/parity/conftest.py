"""Both backends are compared as users run them."""

import pytest


@pytest.fixture(autouse=True)
def as_users_run_it(optimized):
    """XLA optimises."""
