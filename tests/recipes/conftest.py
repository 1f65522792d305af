"""Collect the tests of the image recipes only where torchvision is installed.

`make test-integrations` installs it; the environment of `make test` doesn't have it.
"""

from __future__ import annotations

import importlib.util

NEEDS_TORCHVISION = ["test_classification*.py", "test_detection*.py"]
collect_ignore_glob = [] if importlib.util.find_spec("torchvision") else NEEDS_TORCHVISION
