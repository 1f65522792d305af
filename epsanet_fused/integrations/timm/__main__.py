"""Runs a script that builds timm models, with EPSANet among them. See the package's docstring.

    python -m epsanet_fused.integrations.timm SCRIPT [ARGUMENTS ...]

The script sees what it would see by ``python SCRIPT [ARGUMENTS ...]``: its arguments, its folder
first on the path, and ``__name__ == "__main__"``. Data loaders' workers and forked processes know
the models; a process that the script *spawns* knows them once it unpickles one of them, or imports
``epsanet_fused.integrations.timm`` itself.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path


def _script(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a Python file, got {text!r}, which is none")
    return path.absolute()  # as Python has __file__


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m epsanet_fused.integrations.timm",
        description="Run a script of timm, such as its train.py, with the EPSANets registered.",
        usage="%(prog)s SCRIPT [ARGUMENTS ...]",
    )
    parser.add_argument("script", metavar="SCRIPT", type=_script)
    script = parser.parse_args(sys.argv[1:2]).script
    del sys.argv[0]  # runpy writes the script's path over the first
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
