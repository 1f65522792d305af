"""The recipes for images need torchvision, which only `make test-integrations` installs."""

from __future__ import annotations

import importlib.util

NEEDS_TORCHVISION = ["test_classification*.py", "test_detection*.py", "test_training.py"]
collect_ignore_glob = [] if importlib.util.find_spec("torchvision") else NEEDS_TORCHVISION
