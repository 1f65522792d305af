"""The registry chooses a backend and says which backends can't run and why."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.cases import Shape, make_case

import epsanet_fused as ef
from epsanet_fused.backends import defaults
from epsanet_fused.backends.defaults import CUDA_TABLE, TailProblem, TailRule, look_up
from epsanet_fused.backends.registry import current_backend, get_backend, resolve
from epsanet_fused.testing.accuracy import evaluate

SHAPE = Shape(2, 3, 8, 4, 5, 2)
HIDE_TRITON = "import sys; sys.modules['triton'] = None; "


def python(code: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that treats warnings as errors, without TRITON_INTERPRET."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=clean | env,
        check=False,
    )


RUN = (
    "import torch, epsanet_fused as ef; m = ef.FusedPSAModule(64, 64); "
    "m(torch.randn(1, 64, 8, 8)).sum().backward(); print('ran', ef.list_backends()['triton'])"
)


def test_runs_without_triton() -> None:
    done = python(HIDE_TRITON + RUN)
    assert done.returncode == 0, done.stderr
    assert "ran" in done.stdout
    assert "available=False" in done.stdout
    assert "triton" in done.stdout.split("reason=")[1]


def test_runs_where_no_device_is_visible(tmp_path: Path) -> None:
    done = python(RUN, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "under TRITON_INTERPRET=1" in done.stdout


def test_importing_needs_no_optional_package() -> None:
    """The import needs torch alone: neither triton nor the packages of benchmarks and recipes."""
    code = (
        "import sys, torch; before = set(sys.modules); import epsanet_fused; "
        "print({m.split('.')[0] for m in set(sys.modules) - before})"
    )
    done = python(code)
    assert done.stdout.strip() == "{'epsanet_fused'}", done.stdout + done.stderr


def test_environment_variable_sets_the_backend() -> None:
    code = (
        "import torch, epsanet_fused as ef; xs = [torch.randn(1, 4, 2, 2)] * 2; "
        "ef.psa_tail(xs, torch.ones(1, 4), torch.ones(1), torch.ones(4, 1), torch.ones(4))"
    )
    assert python(code, EPSANET_FUSED_BACKEND="reference").returncode == 0
    wrong = python(code, EPSANET_FUSED_BACKEND="fastest")
    assert wrong.returncode != 0
    assert (
        "EPSANET_FUSED_BACKEND must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda'"
        in wrong.stderr
    )
    cannot = python(code, EPSANET_FUSED_BACKEND="triton")
    assert cannot.returncode != 0
    assert "the backend 'triton' can't run here: it needs a CUDA or ROCm device" in cannot.stderr


def test_use_backend_names_what_it_accepts_and_restores() -> None:
    with pytest.raises(ValueError, match=r"use_backend: name must be one of 'auto'.*got 'cudnn'"):
        ef.use_backend("cudnn").__enter__()
    with pytest.raises(RuntimeError, match="interrupted"):  # noqa: SIM117, the order matters
        with ef.use_backend("reference"), ef.use_backend("triton"):
            assert current_backend() == "triton"
            raise RuntimeError("interrupted")
    assert current_backend() == "auto"


def test_backward_runs_by_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    triton = get_backend("triton")
    backward = triton.backward
    monkeypatch.setattr(triton, "backward", lambda *a: calls.append("triton") or backward(*a))
    case = make_case(SHAPE)
    branches = [x.requires_grad_() for x in case.branches]
    with ef.use_backend("triton"):
        out = ef.psa_tail(branches, *case.fc)
    out.sum().backward()
    assert calls == ["triton"]


def test_threads_get_their_own_right_answers() -> None:
    cases = [make_case(SHAPE._replace(B=b)) for b in (1, 2, 3, 4)]
    alone = [evaluate(ef.psa_tail, *case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: evaluate(ef.psa_tail, *case), cases * 8))
    for i, results in enumerate(together):
        for a, b in zip(results, alone[i % 4], strict=True):
            torch.testing.assert_close(a, b)


def test_a_fallback_warns_once() -> None:
    """On a GPU without triton, "auto" falls back to a slower backend with one warning."""
    code = HIDE_TRITON + (
        "import warnings; from epsanet_fused.backends.registry import resolve\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    print(resolve('auto', 'cuda').name, resolve('auto', 'cuda').name)\n"
        "print(len(seen), seen[0].message)"
    )
    done = python(code)
    first, second = done.stdout.splitlines()
    assert first.split() == ["reference"] * 2
    assert second.startswith("1 epsanet_fused: the backend 'triton' can't run on cuda tensors")
    assert "slower" in second


def test_the_first_rule_that_covers_a_problem_decides() -> None:
    """Without such a rule "auto" takes the preferred order."""
    any_size = (0, 2**62)
    table = (
        TailRule(90, False, torch.float16, (0, 200_000), (128, 2**31), "cuda"),
        TailRule(None, True, None, any_size, any_size, "reference"),
    )
    covered = TailProblem(90, False, torch.float16, 200_000, 128)
    assert look_up(covered, table) == "cuda"
    for other in (
        covered._replace(arch=80),
        covered._replace(dtype=torch.bfloat16),
        covered._replace(sample_bytes=200_001),
        covered._replace(batch=127),
    ):
        assert look_up(other, table) is None
        assert look_up(other._replace(channels_last=True), table) == "reference"
    # Not "cuda:one_pass": it raises an error where one pass can't run.
    assert all(rule.backend in (*ef.list_backends(), "cuda:two_pass") for rule in CUDA_TABLE)


def test_auto_takes_the_backend_of_a_rule_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    branches = [torch.empty(2, 4, 3, 3)] * 2
    problem = TailProblem(90, False, torch.float32, 288, 2)
    monkeypatch.setattr(defaults, "describe", lambda _: problem)
    rule = TailRule(90, None, None, (0, 300), (1, 8), "cuda")
    monkeypatch.setattr(defaults, "CUDA_TABLE", (rule,))
    monkeypatch.setitem(defaults.PREFERRED, "cuda", ("reference",))
    cuda = get_backend("cuda")
    monkeypatch.setattr(cuda, "unavailable_reason", lambda _: None)
    assert resolve("auto", "cuda", branches) is cuda
    monkeypatch.setattr(cuda, "unavailable_reason", lambda _: "no GPU")
    assert resolve("auto", "cuda", branches) is get_backend("reference")
