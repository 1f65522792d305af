"""Build the CPU kernels with AddressSanitizer and UBSan, and run the operator's tests over them.

make test-sanitized
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
TESTS = (
    "test_psa_tail.py", "test_psa_tail_errors.py", "test_psa_tail_properties.py",
    "test_psa_tail_norm.py",
)  # fmt: skip
CHECK = """
import epsanet_fused as ef
from epsanet_fused.backends.compiled import PATH
assert PATH.is_relative_to({folder!r}), PATH
assert ef.list_backends()["cpu"].available, ef.list_backends()
assert "libasan" in open("/proc/self/maps").read()
symbols = open(PATH, "rb").read()
assert b"__asan_report_load" in symbols and b"__ubsan_handle" in symbols
"""


def library(name: str) -> str:
    command = (os.environ.get("CXX", "c++"), f"-print-file-name={name}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        install = (
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
            "--no-build-isolation", "--target", folder, str(ROOT),
        )  # fmt: skip
        build = {"EPSANET_FUSED_BUILD": "cpu", "CFLAGS": FLAGS, "LDFLAGS": FLAGS}
        subprocess.run(install, env=os.environ | build, check=True)
        # libstdc++ too, or the sanitizer finds no __cxa_throw to hand exceptions on to.
        preload = " ".join(map(library, ("libasan.so", "libstdc++.so")))
        env = os.environ | {
            "PYTHONPATH": folder,
            "LD_PRELOAD": preload,
            # Python itself leaks by intent; what PyTorch does is not what is tested here.
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        subprocess.run([sys.executable, "-c", CHECK.format(folder=folder)], env=env, check=True,
                       cwd=folder)  # fmt: skip
        # Not `python -m pytest`, which would find the package of the source tree first.
        pytest = (
            Path(sys.executable).with_name("pytest"), *(ROOT / "tests/ops" / t for t in TESTS),
            "-k", "cpu", "-n", "2", "--timeout", "600", "-p", "no:cacheprovider",
        )  # fmt: skip
        done = subprocess.run([*map(str, pytest)], env=env, cwd=ROOT, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
