"""The recipe for classification: what it learns, what it reports, what it refuses."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.datasets import write_digits, write_patches
from helpers.processes import load, recipe, rows_of
from PIL import Image

import epsanet_fused as ef

SMALL = ("--image-size", 32, "--workers", 0, "--device", "cpu")


def classification(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return recipe("classification.py", *arguments, processes=processes)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Emptied after the module: each checkpoint has 160 MB."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def patches(folder: Path) -> Path:
    return write_patches(folder / "patches", train=16, val=6)


@pytest.fixture(scope="module")
def digits(folder: Path) -> Path:
    return write_digits(folder / "digits", classes=6, train=4, val=2)


@pytest.fixture(scope="module")
def trained(folder: Path, patches: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Six epochs of four steps on patches of two photographs."""
    out = folder / "trained"
    options = ("--epochs", 6, "--batch-size", 8, "--lr", 0.001)
    return classification(patches, "--out", out, *options, *SMALL, "--workers", 1), out


def test_it_learns_and_keeps_a_log(trained) -> None:
    done, out = trained
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "epoch 6/6" in done.stderr
    assert "loss=" in done.stderr
    rows = rows_of(out / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    assert float(rows[-1]["train_top1"]) > 75
    assert all(float(row["images_per_s"]) > 0 for row in rows)
    assert {row["top5"] for row in rows} == {"100.0"}  # of two classes
    assert {p.name for p in out.iterdir()} == {
        "checkpoint.pth.tar", "model_best.pth.tar", "log.csv",
    }  # fmt: skip


def test_the_best_is_the_first_of_the_highest_top1(trained) -> None:
    _, out = trained
    top1 = [float(row["top1"]) for row in rows_of(out / "log.csv")]
    best = load(out / "model_best.pth.tar")
    assert best["best_prec1"] == max(top1)
    assert best["epoch"] == 1 + top1.index(max(top1))
    assert best["arch"] == "epsanet50"
    assert load(out / "checkpoint.pth.tar")["epoch"] == 6


def _own_evaluation(model: torch.nn.Module, val: Path) -> tuple[float, float]:
    """Loss and top-1 in percent, image by image, by Pillow and NumPy alone."""
    losses, hits = [], []
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for label, name in enumerate(sorted(p.name for p in val.iterdir())):
        for path in (val / name).iterdir():
            image = Image.open(path).convert("RGB").resize((37, 37), Image.Resampling.BILINEAR)
            pixels = (np.asarray(image)[2:34, 2:34] / 255 - mean) / std  # (32, 32, 3)
            x = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            with torch.no_grad():
                logits = model(x)
            losses.append(F.cross_entropy(logits, torch.tensor([label])).item())
            hits.append(logits.argmax().item() == label)
    return sum(losses) / len(losses), 100 * sum(hits) / len(hits)


def _printed(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    words = done.stdout.split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


def test_eval_gives_what_a_loop_of_ones_own_does(trained, patches: Path, folder: Path) -> None:
    _, out = trained
    checkpoint = out / "model_best.pth.tar"
    model = ef.epsanet50(num_classes=2).eval()
    ef.load_checkpoint(model, checkpoint)
    loss, top1 = _own_evaluation(model, patches / "val")
    alone = folder / "alone"  # to evaluate there need be no images to train with
    shutil.copytree(patches / "val", alone / "val")
    options = ("--eval", "--weights", checkpoint, *SMALL, "--batch-size", 5)
    one = classification(alone, *options)
    assert one.returncode == 0, one.stderr
    assert _printed(one)["val_loss"] == pytest.approx(loss, abs=2e-4)
    assert _printed(one)["top1"] == pytest.approx(top1, abs=1e-4)
    two = classification(alone, *options[:1], "--resume", *options[2:], processes=2)
    assert two.returncode == 0, two.stderr
    assert _printed(two) == pytest.approx(_printed(one), abs=1e-4)
    row = rows_of(out / "log.csv")[load(checkpoint)["epoch"] - 1]
    assert {k: float(row[k]) for k in _printed(one)} == pytest.approx(_printed(one), abs=1e-4)


def test_fine_tuning_drops_the_classifier_and_says_so(trained, digits: Path, folder: Path) -> None:
    checkpoint = trained[1] / "checkpoint.pth.tar"
    out = folder / "fine"
    # A rate that doesn't move a weight: what was loaded is still there.
    options = ("--epochs", 1, "--batch-size", 8, "--lr", 1e-30, "--weight-decay", 0)
    done = classification(digits, "--weights", checkpoint, "--out", out, *options, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "dropped fc.weight and fc.bias, which are for 2 classes; the data have 6" in done.stdout
    before, after = (load(path)["state_dict"] for path in (checkpoint, out / "checkpoint.pth.tar"))
    names = [k for k, _ in ef.epsanet50().named_parameters() if not k.startswith("fc.")]
    before, kept = ({k: state[k] for k in names} for state in (before, after))
    torch.testing.assert_close(kept, before, rtol=0, atol=0)
    assert after["fc.weight"].shape == (6, 2048)


def test_cosine_average_and_mixed_precision(digits: Path, folder: Path) -> None:
    out = folder / "average"
    schedule = ("--schedule", "cosine", "--warmup-epochs", 1, "--lr", 0.004, "--epochs", 3)
    kinds = ("--ema", 0.5, "--amp", "--channels-last")
    done = classification(digits, "--out", out, "--batch-size", 12, *schedule, *kinds, *SMALL)
    assert done.returncode == 0, done.stderr
    # Two steps an epoch. The last of the first epoch is at the top; then a cosine over four.
    rates = [float(row["lr"]) for row in rows_of(out / "log.csv")]
    assert rates == pytest.approx([0.004, 0.002 * (1 + 0.5**0.5), 0.002 * (1 - 0.5**0.5)])
    content = load(out / "checkpoint.pth.tar")
    average, raw = content["state_dict"], content["raw_state_dict"]
    assert any(not torch.equal(average[k], raw[k]) for k in raw)
    assert all(v.isfinite().all() for v in average.values())
    # What was evaluated in training is what anybody gets from the file.
    same = ("--amp", "--channels-last", "--batch-size", 12, *SMALL)
    done = classification(digits, "--eval", "--weights", out / "checkpoint.pth.tar", *same)
    row = rows_of(out / "log.csv")[-1]
    assert _printed(done) == pytest.approx(
        {k: float(row[k]) for k in ("val_loss", "top1", "top5")}, abs=1e-4
    )


def test_the_published_schedule() -> None:
    import classification as module

    args = module.parse_arguments([str(Path(__file__).parent)])
    rates = [module.learning_rate(args, epoch, 3, 5) for epoch in (0, 29, 30, 59, 60, 90, 119)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 1e-4, 1e-4])
    assert (args.epochs, args.batch_size, args.momentum, args.weight_decay) == (120, 256, 0.9, 1e-4)
    assert (args.label_smoothing, args.image_size, args.model) == (0.1, 224, "epsanet50")


def test_top5_is_among_the_five_highest() -> None:
    import classification as module

    logits = torch.arange(8.0).expand(3, 8)  # the classes 7, 6, 5, 4, 3 are the highest
    found = module.scores(logits, torch.tensor([7, 3, 2]))
    assert {name: value.item() for name, value in found.items()} == {"top1": 100, "top5": 200}
