"""python -m epsanet_fused.integrations.timm runs timm scripts with the EPSANets registered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import load_state_dict

RUNNER = ("-m", "epsanet_fused.integrations.timm")
TRAINING = Path(__file__).resolve().parent / "timm_training.py"


def python(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def run(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run Python to success and return its stdout."""
    done = python(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of scanned digits: 8 images of each for training, 4 for validation."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for label in range(10):
        for i, image in enumerate(digits.images[digits.target == label][:12]):
            folder = root / ("train" if i < 8 else "validation") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.kron(image * 15.9, np.ones((4, 4))).astype(np.uint8)  # (32, 32)
            Image.fromarray(pixels).convert("RGB").save(folder / f"{i}.png")
    return root


def results(out: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((out / f"{rank}.json").read_text())


def test_a_resumed_training_gives_the_same_result(data: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    for out in (once, twice):
        out.mkdir()
    run(*RUNNER, TRAINING, data, once, 2)
    run(*RUNNER, TRAINING, data, twice, 1)
    first = results(twice)
    run(*RUNNER, TRAINING, data, twice, 2, twice / "last.pth.tar")
    found, resumed = results(once), results(twice)
    assert len(found["losses"]) == 10
    assert found["losses"] == first["losses"] + resumed["losses"]
    assert found["top1"] == resumed["top1"]
    assert found["lr_scales"] == 6  # stem, four blocks, classifier
    for ema in (False, True):
        states = [load_state_dict(out / "last.pth.tar", use_ema=ema) for out in (once, twice)]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert {"checkpoint-0.pth.tar", "checkpoint-1.pth.tar", "model_best.pth.tar"} <= {
        path.name for path in once.iterdir()
    }


def test_two_processes_train_one_model(data: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run(*torchrun, *RUNNER, TRAINING, data, tmp_path, 1)
    one, other = results(tmp_path, 0), results(tmp_path, 1)
    assert (one["rank"], other["rank"], one["world_size"]) == (0, 1, 2)
    assert one["losses"] != other["losses"]  # the processes have different images
    assert len(one["losses"]) == len(other["losses"]) == 2
    assert one["total"] == other["total"]


REPORT = """
import importlib.util, json, sys
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": __file__, "spec": str(main.__spec__),
    "main": main.__dict__ is globals(), "neighbour": bool(importlib.util.find_spec("neighbour")),
}))
"""


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_a_script_runs_as_with_plain_python(
    safe_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "report.py").write_text(REPORT)
    (folder / "neighbour.py").write_text("")
    arguments = ("scripts/report.py", "--model", "x", "--", "-h")
    found = json.loads(run(*RUNNER, *arguments, cwd=tmp_path))
    expected = json.loads(run(*arguments, cwd=tmp_path))
    assert Path(tmp_path, found["argv"].pop(0)) == Path(tmp_path, expected["argv"].pop(0))
    assert found == expected


CHILDREN = """
import multiprocessing as mp
import timm, torch
from torch.utils.data import DataLoader

def work(model, queue):
    queue.put((model(torch.ones(1, 3, 32, 32)).shape[1], timm.is_model("epsanet50")))

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        context = mp.get_context(method)
        queue = context.Queue()
        model = timm.create_model("epsanet50", layers=(1, 1, 1, 1), num_classes=2).eval()
        process = context.Process(target=work, args=(model, queue))
        process.start()
        loader = DataLoader(range(4), 2, num_workers=1, multiprocessing_context=method)
        print(method, *queue.get(), torch.cat(list(loader)).tolist())
        process.join()
"""


def test_child_processes_of_a_script_know_the_models(tmp_path: Path) -> None:
    script = tmp_path / "children.py"
    script.write_text(CHILDREN)
    expected = ["fork 2 True [0, 1, 2, 3]", "spawn 2 True [0, 1, 2, 3]"]
    assert run(*RUNNER, script).splitlines() == expected


def test_the_exit_status_is_the_scripts(tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text("import sys, epsanet_fused.integrations.timm; sys.exit(7)")
    done = python("-W", "always", *RUNNER, script)
    assert done.returncode == 7
    assert "Overwriting" not in done.stderr  # timm's warning about models that are registered twice
    script.write_text("1 / 0")
    done = python(*RUNNER, script)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SCRIPT"),
        (["nowhere.py"], "argument SCRIPT: must be a Python file, got 'nowhere.py', which is none"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = python(*RUNNER, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
