"""The seed of everything random in these tests."""

import os
import random

import pytest


@pytest.fixture
def seed() -> str:
    """Of the environment, or a new one; told where a test fails."""
    return os.environ.get("OLLAMUX_CHAOS_SEED") or str(random.SystemRandom().randrange(10**6))


@pytest.fixture
def dice(seed: str) -> random.Random:
    return random.Random(seed)
