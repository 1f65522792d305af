"""Build the wheel once; install, import and test it under every torch and Python that there is.

    make test-matrix

One compiled library is to serve them all. Each combination gets a virtual environment of its own,
which is removed when it has been tried; a torch with CUDA takes minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.10", "2.11", "2.13", "newest")
# The operator's accuracy, strides, formats, dtypes and gradients by the compiled CPU kernels.
TESTS = ("tests/ops/test_psa_tail.py", "-k", "cpu")
CHECK = (
    "import torch, epsanet_fused as ef; from epsanet_fused.backends.compiled import library; "
    "assert ef.list_backends()['cpu'].available, ef.list_backends(); "
    "print(torch.__version__, torch.version.cuda, library())"
)


def run(*command: object, cwd: Path | None = None) -> str:
    """The command's output; SystemExit with all of it if the command fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout.strip()


def pythons() -> list[str]:
    """The oldest and the newest interpreter that we support and that works here."""
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = []
    for version in PYTHONS:
        candidates = [*map(str, sorted(installed.glob(f"{version}.*/bin/python"))),
                      f"python{version}"]  # fmt: skip
        for command in candidates:
            works = shutil.which(command) and subprocess.run(
                [command, "-c", "import venv, ensurepip"], capture_output=True, check=False
            )
            if works and works.returncode == 0:
                found.append(command)
                break
    return list(dict.fromkeys([found[0], found[-1]]))


def build_wheel(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    if "epsanet_fused/_C.abi3.so" not in names:
        raise SystemExit(f"the wheel {wheel.name} has no compiled library")
    return wheel


def try_one(wheel: Path, python: str, torch: str, scratch: Path) -> str:
    """Install the wheel beside that torch, import it elsewhere than in the source, and test it."""
    env = scratch / "env"
    run(python, "-m", "venv", env)
    own = env / "bin/python"
    requirement = "torch" if torch == "newest" else f"torch=={torch}.*"
    try:
        run(own, "-m", "pip", "install", "--quiet", requirement, "numpy<2.4", "pytest", wheel)
        found = run(own, "-W", "error", "-c", CHECK, cwd=scratch)
        work = scratch / "work"
        shutil.copytree(ROOT / "tests", work / "tests")
        shutil.copy(ROOT / "pyproject.toml", work)
        tests = run(own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, cwd=work)
        return f"{found}; {tests.splitlines()[-1]}"
    finally:
        shutil.rmtree(env, ignore_errors=True)
        shutil.rmtree(scratch / "work", ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", nargs="+", default=TORCHES)
    parser.add_argument("--python", nargs="+", default=pythons())
    args = parser.parse_args(argv)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheel = build_wheel(scratch)
        print(wheel.name, flush=True)
        for python in args.python:
            for torch in args.torch:
                began = time.monotonic()
                try:
                    result = f"ok: {try_one(wheel, python, torch, scratch)}"
                except SystemExit as error:
                    failures += 1
                    result = f"FAILED: {error}"
                print(f"{python}, torch {torch}, {time.monotonic() - began:.0f} s: {result}")
                sys.stdout.flush()
    print(f"{failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
