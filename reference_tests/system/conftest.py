import pytest

from harness import overlay
from harness.paths import REFERENCE, ROOT


@pytest.fixture(scope="module")
def reference():
    """The reference solution as `recsys`, in this process."""
    before = overlay.installed() if overlay.is_installed() else None
    overlay.install(overlay.resolve([str(REFERENCE)], ROOT))
    overlay.purge()
    try:
        yield
    finally:
        overlay.uninstall()
        overlay.purge()
        if before:
            overlay.install(before)
