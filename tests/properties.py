"""The number of examples per property: few by default, or the value of the variable TUTTI_EXAMPLES."""

import os
from typing import Any

from hypothesis import HealthCheck, settings


def examples(count: int) -> Any:
    """Settings of a hypothesis test that takes `count` examples unless TUTTI_EXAMPLES says otherwise."""
    return settings(
        max_examples=int(os.environ.get("TUTTI_EXAMPLES", count)),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
