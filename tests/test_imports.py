"""Every module can be imported by its dotted path, and no other name hides it."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import subprocess
import sys

import epsanet_fused

# `import epsanet_fused.x.y` imports the root first: so a process that is forked behind that import
# is as good as a fresh one.
IN_A_FORK_EACH = """
import importlib, os, sys, traceback
import epsanet_fused
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
            found = epsanet_fused
            for part in name.split(".")[1:]:
                found = getattr(found, part)
            assert found is sys.modules[name], f"{name} is hidden by {found!r}"
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(name, "ok" if status == 0 else "failed", flush=True)
"""


def modules() -> list[str]:
    """All modules of the package, but for integrations whose package isn't installed."""
    absent = [p for p in ("timm", "torchvision") if importlib.util.find_spec(p) is None]
    # Not walk_packages, which imports what it finds.
    found, left = [], [("epsanet_fused.", epsanet_fused.__path__)]
    while left:
        prefix, path = left.pop()
        for info in pkgutil.iter_modules(path, prefix):
            name = info.name.rpartition(".")[2]
            if name in absent or name == "_C":
                continue
            found.append(info.name)
            if info.ispkg:
                left.append((f"{info.name}.", [f"{p}/{name}" for p in path]))
    return found


def test_each_dotted_path_leads_to_its_module() -> None:
    names = modules()
    for name in ("backends.triton", "fusion.fuse", "inference.optimize", "ops.psa_tail"):
        assert f"epsanet_fused.{name}" in names
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FORK_EACH, *names],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.stdout.splitlines() == [f"{name} ok" for name in names], done.stderr
