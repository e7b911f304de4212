"""How Hypothesis searches: a machine under load is no reason to fail."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "core", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("core")
