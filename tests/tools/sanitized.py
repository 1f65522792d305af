"""Build the CPU kernels with AddressSanitizer and UBSan, and run the operators' tests with them.

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
    "test_psa_tail.py",
    "test_psa_tail_errors.py",
    "test_psa_tail_properties.py",
    "test_psa_tail_norm.py",
    "test_psa_tail_norm_errors.py",
)
CHECK = """
import epsanet_fused as ef
from epsanet_fused.backends.compiled import LIBRARY_FILE
assert LIBRARY_FILE.is_relative_to({folder!r}), LIBRARY_FILE
assert ef.list_backends()["cpu"].available, ef.list_backends()
assert "libasan" in open("/proc/self/maps").read()
symbols = open(LIBRARY_FILE, "rb").read()
assert b"__asan_report_load" in symbols and b"__ubsan_handle" in symbols
"""


def library(name: str) -> str:
    command = (os.environ.get("CXX", "c++"), f"-print-file-name={name}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
        build = {"EPSANET_FUSED_BUILD": "cpu", "CFLAGS": FLAGS, "LDFLAGS": FLAGS}
        subprocess.run(
            [*pip, "--no-build-isolation", "--target", folder, str(ROOT)],
            env=os.environ | build,
            check=True,
        )
        # The sanitizer needs __cxa_throw of libstdc++ to intercept exceptions.
        preload = " ".join(map(library, ("libasan.so", "libstdc++.so")))
        env = os.environ | {
            "PYTHONPATH": folder,
            "LD_PRELOAD": preload,
            # Python leaks by design, and PyTorch's leaks aren't ours.
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        check = CHECK.format(folder=folder)
        subprocess.run([sys.executable, "-c", check], env=env, check=True, cwd=folder)
        # `python -m pytest` would import the package from the source tree.
        pytest = Path(sys.executable).with_name("pytest")
        tests = [ROOT / "tests/ops" / test for test in TESTS]
        options = ["-k", "cpu", "-n", "2", "--timeout", "600", "-p", "no:cacheprovider"]
        done = subprocess.run([pytest, *tests, *options], env=env, cwd=ROOT, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
