"""The recipes import one another as scripts do: by their folder on the path."""

from __future__ import annotations

import sys

from recipe_runs import RECIPES

sys.path.insert(0, str(RECIPES))
