"""Build the wheel once; install, import and test it with every supported torch and Python.

    make test-matrix

One compiled library must work with all of them. Each combination gets a virtual environment of its
own, which is removed after the test. A torch with CUDA takes minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import itertools
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
# Accuracy, strides, memory formats, dtypes and gradients of psa_tail with the CPU kernels.
TESTS = ("tests/ops/test_psa_tail.py", "-k", "cpu")
CHECK = (
    "import torch, epsanet_fused as ef; from epsanet_fused.backends.compiled import load_library; "
    "assert ef.list_backends()['cpu'].available, ef.list_backends(); "
    "print(torch.__version__, torch.version.cuda, load_library())"
)


def run(*command: object, cwd: Path | None = None) -> str:
    """Return the command's output. Raise SystemExit with the output if the command fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=env,
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout.strip()


def pythons() -> list[str]:
    """Return the oldest and the newest supported interpreter that works here."""
    found = [command for version in PYTHONS if (command := find_python(version))]
    return list(dict.fromkeys([found[0], found[-1]]))


def find_python(version: str) -> str | None:
    """Return an interpreter of that version that can make virtual environments."""
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for command in (*sorted(installed.glob(f"{version}.*/bin/python")), f"python{version}"):
        test = [command, "-c", "import venv, ensurepip"]
        if shutil.which(command) and subprocess.run(test, capture_output=True).returncode == 0:
            return str(command)
    return None


def build_wheel(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    if "epsanet_fused/_C.abi3.so" not in names:
        raise SystemExit(f"the wheel {wheel.name} has no compiled library")
    return wheel


def test_wheel(wheel: Path, python: str, torch: str, scratch: Path) -> str:
    """Install the wheel with that torch, import it outside of the source tree, and test it."""
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
        for python, torch in itertools.product(args.python, args.torch):
            start = time.monotonic()
            try:
                result = f"ok: {test_wheel(wheel, python, torch, scratch)}"
            except SystemExit as error:
                failures += 1
                result = f"FAILED: {error}"
            seconds = time.monotonic() - start
            print(f"{python}, torch {torch}, {seconds:.0f} s: {result}", flush=True)
    print(f"{failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
