"""EPSANet passes timm's own tests of its models, unchanged, from timm's source archive.

Not run: the tests that name another model, the transformers' tests (``default_cfgs_non_std``) and
the tests that download weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

from epsanet_fused.nn.epsanet import ARCHITECTURES

HERE = Path(__file__).resolve().parent
SOURCES = Path(sys.prefix) / "sources" / f"timm-{timm.__version__}"  # the Makefile unpacks them
TESTS = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_torchscript",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}
# Environment variables with which timm's tests skip models or use another device.
UNSET = ("GITHUB_ACTIONS", "PYTEST_ADDOPTS", "TORCH_BACKEND", "TORCH_DEVICE")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The result of each model and test: "passed", "failure", "error" or "skipped"."""
    folder = tmp_path_factory.mktemp("suite")
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = {k: v for k, v in os.environ.items() if k not in UNSET} | {"PYTHONPATH": path}
    options = [
        *("-c", SOURCES / "pyproject.toml", "--rootdir", SOURCES, "--import-mode", "importlib"),
        *("-p", "only_epsanet", "-p", "no:cacheprovider", "-k", "epsanet"),
        *("--junit-xml", folder / "report.xml"),
    ]
    command = [sys.executable, "-m", "pytest", SOURCES / "tests" / "test_models.py", *options]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    report = folder / "report.xml"
    assert report.exists(), done.stdout + done.stderr
    print(done.stdout)  # pytest shows it if a test fails
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = case.attrib["name"].removesuffix("]").partition("[")
        model = parameters.rpartition("-")[2]
        found[model][test] = next(
            (part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed"
        )
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timms_tests_pass(name: str, outcomes: dict[str, dict[str, str]]) -> None:
    """None of the tests fails or is skipped."""
    assert {test: outcomes[name].get(test) for test in TESTS} == dict.fromkeys(TESTS, "passed")
    assert set(outcomes[name].values()) == {"passed"}, outcomes[name]


def test_no_other_model_was_tested(outcomes: dict[str, dict[str, str]]) -> None:
    assert set(outcomes) == set(ARCHITECTURES)
