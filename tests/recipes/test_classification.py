"""recipes/classification.py learns, and its log, checkpoints and evaluation are right."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import classification
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.datasets import write_digits, write_patches
from helpers.processes import load_checkpoint, rows_of, run_recipe
from PIL import Image

import epsanet_fused as ef

SMALL = ("--image-size", 32, "--workers", 0, "--device", "cpu")


def run_classification(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return run_recipe("classification.py", *arguments, processes=processes)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that is removed after the module, because a checkpoint takes 160 MB."""
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
    """A run of six epochs of four steps on patches of two photographs, and its folder."""
    out = folder / "trained"
    options = ("--epochs", 6, "--batch-size", 8, "--lr", 0.001)
    done = run_classification(patches, "--out", out, *options, *SMALL, "--workers", 1)
    return done, out


def test_training_learns_and_writes_a_log(trained) -> None:
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
    assert {row["top5"] for row in rows} == {"100.0"}  # there are only two classes
    files = {"checkpoint.pth.tar", "model_best.pth.tar", "log.csv"}
    assert {p.name for p in out.iterdir()} == files


def test_model_best_is_the_first_epoch_of_the_highest_top1(trained) -> None:
    _, out = trained
    top1 = [float(row["top1"]) for row in rows_of(out / "log.csv")]
    best = load_checkpoint(out / "model_best.pth.tar")
    assert best["best_prec1"] == max(top1)
    assert best["epoch"] == 1 + top1.index(max(top1))
    assert best["arch"] == "epsanet50"
    assert load_checkpoint(out / "checkpoint.pth.tar")["epoch"] == 6


def _evaluate_by_hand(model: torch.nn.Module, val: Path) -> tuple[float, float]:
    """Return loss and top-1 in percent, computed image by image with Pillow and NumPy."""
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


def _metrics_in(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    words = done.stdout.split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


def test_eval_agrees_with_a_plain_loop(trained, patches: Path, folder: Path) -> None:
    _, out = trained
    checkpoint = out / "model_best.pth.tar"
    model = ef.epsanet50(num_classes=2).eval()
    ef.load_checkpoint(model, checkpoint)
    loss, top1 = _evaluate_by_hand(model, patches / "val")
    only_val = folder / "only_val"  # --eval must not need DATA/train
    shutil.copytree(patches / "val", only_val / "val")
    options = ("--eval", "--weights", checkpoint, *SMALL, "--batch-size", 5)
    one = run_classification(only_val, *options)
    assert one.returncode == 0, one.stderr
    assert _metrics_in(one)["val_loss"] == pytest.approx(loss, abs=2e-4)
    assert _metrics_in(one)["top1"] == pytest.approx(top1, abs=1e-4)
    two = run_classification(only_val, *options[:1], "--resume", *options[2:], processes=2)
    assert two.returncode == 0, two.stderr
    assert _metrics_in(two) == pytest.approx(_metrics_in(one), abs=1e-4)
    row = rows_of(out / "log.csv")[load_checkpoint(checkpoint)["epoch"] - 1]
    assert {k: float(row[k]) for k in _metrics_in(one)} == pytest.approx(_metrics_in(one), abs=1e-4)


def test_fine_tuning_drops_a_classifier_of_other_classes(
    trained, digits: Path, folder: Path
) -> None:
    checkpoint = trained[1] / "checkpoint.pth.tar"
    out = folder / "fine"
    # With this learning rate no weight changes, so the loaded weights can be compared.
    options = ("--epochs", 1, "--batch-size", 8, "--lr", 1e-30, "--weight-decay", 0)
    done = run_classification(digits, "--weights", checkpoint, "--out", out, *options, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "dropped fc.weight and fc.bias, which are for 2 classes; the data have 6" in done.stdout
    before, after = (
        load_checkpoint(path)["state_dict"] for path in (checkpoint, out / "checkpoint.pth.tar")
    )
    names = [k for k, _ in ef.epsanet50().named_parameters() if not k.startswith("fc.")]
    before, kept = ({k: state[k] for k in names} for state in (before, after))
    torch.testing.assert_close(kept, before, rtol=0, atol=0)
    assert after["fc.weight"].shape == (6, 2048)


def test_cosine_schedule_moving_average_and_mixed_precision(digits: Path, folder: Path) -> None:
    out = folder / "average"
    schedule = ("--schedule", "cosine", "--warmup-epochs", 1, "--lr", 0.004, "--epochs", 3)
    # At 32 pixels oneDNN does not write all of a gradient; see docs/numerics.md.
    kinds = ("--batch-size", 12, "--amp", "--channels-last", *SMALL, "--image-size", 64)
    done = run_classification(digits, "--out", out, *schedule, "--ema", 0.5, *kinds)
    assert done.returncode == 0, done.stderr
    # Two steps an epoch: the warm-up ends with the first epoch, the cosine takes four steps.
    rates = [float(row["lr"]) for row in rows_of(out / "log.csv")]
    assert rates == pytest.approx([0.004, 0.002 * (1 + 0.5**0.5), 0.002 * (1 - 0.5**0.5)])
    content = load_checkpoint(out / "checkpoint.pth.tar")
    average, raw = content["state_dict"], content["raw_state_dict"]
    assert any(not torch.equal(average[k], raw[k]) for k in raw)
    assert all(v.isfinite().all() for v in average.values())
    # --eval of the file gives the log's numbers, which are those of the average.
    done = run_classification(digits, "--eval", "--weights", out / "checkpoint.pth.tar", *kinds)
    row = rows_of(out / "log.csv")[-1]
    assert _metrics_in(done) == pytest.approx(
        {k: float(row[k]) for k in ("val_loss", "top1", "top5")}, abs=1e-4
    )


def test_the_defaults_are_the_published_schedule() -> None:
    args = classification.parse_arguments([str(Path(__file__).parent)])
    rates = [
        classification.learning_rate(args, epoch, 3, 5) for epoch in (0, 29, 30, 59, 60, 90, 119)
    ]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 1e-4, 1e-4])
    assert (args.epochs, args.batch_size, args.momentum, args.weight_decay) == (120, 256, 0.9, 1e-4)
    assert (args.label_smoothing, args.image_size, args.model) == (0.1, 224, "epsanet50")


def test_top5_counts_the_five_highest_logits() -> None:
    logits = torch.arange(8.0).expand(3, 8)  # the classes 7, 6, 5, 4, 3 are the highest
    found = classification.accuracy_sums(logits, torch.tensor([7, 3, 2]))
    assert {name: value.item() for name, value in found.items()} == {"top1": 100, "top5": 200}
