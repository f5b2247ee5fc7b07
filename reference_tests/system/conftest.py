import pytest

from harness import overlay
from harness.paths import REFERENCE, ROOT


@pytest.fixture(scope="module")
def reference():
    """The reference solution as `recsys`, in this process."""
    with overlay.using(overlay.resolve([str(REFERENCE)], ROOT)):
        yield
