"""The code in README and docs, as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What runs where timm, torchvision and onnx are installed; the rest runs everywhere.
_NEEDS_MORE = re.compile(r"integrations|onnx")


def python_blocks(page: Path, needs_more: bool) -> list[str]:
    """The Python blocks of a page that need more than this package, or those that don't."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return [block for block in blocks if bool(_NEEDS_MORE.search(block)) is needs_more]


def commands(page: Path, program: str) -> list[list[str]]:
    """The command lines of a page, indented by four, that start with this program."""
    lines = re.findall(rf"^    ({re.escape(program)} .*)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]
