"""Registers the harness plugin of this very checkout, whatever pytest took for its root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
pytest_plugins = ["harness.plugin"]
