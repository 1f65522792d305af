"""Run a script that builds timm models, with the EPSANets registered.

    python -m epsanet_fused.integrations.timm SCRIPT [ARGUMENTS ...]

The script sees the same arguments, the same first entry of ``sys.path`` and the same ``__name__``
as with ``python SCRIPT [ARGUMENTS ...]``. The models are also registered in DataLoader workers and
in forked processes. In a process that the script *spawns* they are registered when it unpickles an
EPSANet, or imports ``epsanet_fused.integrations.timm``.
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
    return path.absolute()  # Python's __file__ is absolute, too


def main() -> None:
    """Run the script that is the first command-line argument.

    Raises:
        SystemExit: with status 2 if the argument is missing or isn't a file, or by the script.
    """
    parser = argparse.ArgumentParser(
        prog="python -m epsanet_fused.integrations.timm",
        description="Run a script of timm, such as its train.py, with the EPSANets registered.",
        usage="%(prog)s SCRIPT [ARGUMENTS ...]",
    )
    parser.add_argument("script", metavar="SCRIPT", type=_script)
    script = parser.parse_args(sys.argv[1:2]).script
    del sys.argv[0]  # runpy replaces what is then the first argument by the script's path
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
