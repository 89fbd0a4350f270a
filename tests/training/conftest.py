from typing import Any

import pytest

from gptjax.config import replace


@pytest.fixture
def tiny(tiny: Any) -> Any:
    """The config of a run small enough to train in a test, without samples, which would compile two programs more."""
    return replace(tiny, {"evaluation": {"sample_tokens": 0}})
