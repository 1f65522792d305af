"""Train a small EPSANet on real digits, plain and fused, and check that the two runs agree.

    python recipes/digits.py --out out

The dataset is scikit-learn's 1,797 scanned digits of 8x8 pixels, scaled up to 24x24; a fixed
quarter of them, stratified by class, is the test set. The network is an EPSANet of four blocks with
the paper's kernels and groups. Both runs start from the same seed and see the same batches in the
same order; one uses ``PSAModule``, the other ``FusedPSAModule``.

Needs the packages of ``pip install epsanet-fused[bench]``.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import arguments
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.utils.atomic_write import write_atomically

DTYPE = torch.float64
TOLERANCE = 1e-6
SIDE = 24
BATCH = 64
TEST_IMAGES = 450
TRAIN_IMAGES = 1797 - TEST_IMAGES
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-4


class Data(NamedTuple):
    """Images (N, 3, 24, 24) and their labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Curve(NamedTuple):
    """The loss of every step of a training run, and the test accuracy after every epoch."""

    losses: list[float]
    accuracies: list[float]
    seconds: float


def load_data(count: int, device: torch.device) -> Data:
    """Load the first ``count`` images of the training set, and the whole test set."""
    digits = load_digits()
    labels = torch.tensor(digits.target)
    train_ids, test_ids = train_test_split(
        range(len(labels)), test_size=TEST_IMAGES, stratify=digits.target, random_state=0
    )
    train_ids = train_ids[:count]
    images = torch.tensor(digits.images, dtype=DTYPE)[:, None]  # (N, 1, 8, 8)
    images = (images - images[train_ids].mean()) / images[train_ids].std()
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear")
    images, labels = images.repeat(1, 3, 1, 1).to(device), labels.to(device)
    return Data(images[train_ids], labels[train_ids], images[test_ids], labels[test_ids])


def build(fused: bool, seed: int, device: torch.device) -> ef.EPSANet:
    """Build the network, one block a stage; a seed gives both networks the same weights."""
    torch.manual_seed(seed)
    planes = (64, 64, 64, 64)
    model = ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 10, planes=planes, reduction=4, fused=fused)
    return model.to(device, DTYPE)


def train(model: nn.Module, data: Data, epochs: int, seed: int, name: str) -> Curve:
    """Train by SGD with warm-up and cosine decay; the order of the images depends on the seed."""
    start = time.perf_counter()
    count = len(data.train_labels)
    # An incomplete last batch is dropped: its batch statistics would be mostly noise.
    batches = count // BATCH
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(epochs * batches))
    order = torch.Generator().manual_seed(seed)
    losses, accuracies = [], []
    for _ in _progress(range(epochs), name):
        model.train()
        for batch in torch.randperm(count, generator=order).split(BATCH)[:batches]:
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        accuracies.append(accuracy(model, data.test_images, data.test_labels))
    return Curve(losses, accuracies, time.perf_counter() - start)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that the model, in eval mode, classifies correctly."""
    model.eval()
    return (model(images).argmax(1) == labels).double().mean().item()


def _warmup_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, steps // 5)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


def _progress(epochs: range, name: str) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:
        for epoch in epochs:
            print(f"{name}: epoch {epoch + 1} of {len(epochs)}", file=sys.stderr, flush=True)
            yield epoch
    else:
        yield from tqdm(epochs, desc=name, unit="epoch")


def largest_difference(plain: Curve, fused: Curve) -> float:
    """Return the largest difference between the losses of a step; NaN if a loss is NaN."""
    pairs = zip(plain.losses, fused.losses, strict=True)
    return torch.tensor([abs(a - b) for a, b in pairs], dtype=DTYPE).max().item()


def find_failures(plain: Curve, fused: Curve, min_accuracy: float) -> list[str]:
    """Return the reasons why the two runs fail; an empty list if they pass."""
    found = []
    if not (difference := largest_difference(plain, fused)) <= TOLERANCE:  # also catches NaN
        found.append(f"the losses differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    if plain.accuracies != fused.accuracies:
        found.append(f"the accuracies differ: {plain.accuracies} and {fused.accuracies}")
    for name, curve in (("plain", plain), ("fused", fused)):
        if curve.accuracies[-1] <= min_accuracy:
            found.append(
                f"{name}: the test accuracy is {curve.accuracies[-1]:.2%}, "
                f"not above {min_accuracy:.2%}"
            )
    return found


def table(plain: Curve, fused: Curve) -> str:
    """Return a table of mean losses, largest difference and test accuracies, a line an epoch."""
    lines = [
        "        mean loss           largest     test accuracy",
        "epoch   plain     fused     difference  plain     fused",
    ]
    epochs = len(plain.accuracies)
    batches = len(plain.losses) // epochs
    for e in range(epochs):
        p, f = (
            Curve(c.losses[e * batches : (e + 1) * batches], c.accuracies[e : e + 1], 0.0)
            for c in (plain, fused)
        )
        lines.append(
            f"{e + 1:5}   {sum(p.losses) / batches:.6f}  {sum(f.losses) / batches:.6f}  "
            f"{largest_difference(p, f):<10.1e}  {p.accuracies[0]:<8.2%}  {f.accuracies[0]:.2%}"
        )
    return "\n".join(lines)


def curves_csv(plain: Curve, fused: Curve) -> bytes:
    """Return a CSV file with a row for each step, and accuracies in the last row of each epoch."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("step", "epoch", "plain_loss", "fused_loss", "plain_test_accuracy", "fused_test_accuracy")
    )
    batches = len(plain.losses) // len(plain.accuracies)
    for i, losses in enumerate(zip(plain.losses, fused.losses, strict=True)):
        e, is_last = i // batches, i % batches == batches - 1
        accuracies = (plain.accuracies[e], fused.accuracies[e]) if is_last else ("", "")
        writer.writerow((i + 1, e + 1, *losses, *accuracies))
    return text.getvalue().encode()


def curves_png(plain: Curve, fused: Curve) -> bytes:
    """Plot losses by step and accuracies by epoch as PNG; the fused run is dashed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(plain.accuracies) + 1)
    for name, curve, style in (("plain", plain, "-"), ("fused", fused, "--")):
        width = 3 if name == "plain" else 1.5
        left.plot(curve.losses, style, label=name, linewidth=width)
        right.plot(epochs, curve.accuracies, style, label=name, linewidth=width, marker=".")
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1))
    figure.suptitle(
        f"EPSANet on digits, float64: losses agree within {largest_difference(plain, fused):.1e}"
    )
    for axes in (left, right):
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with a message on errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=arguments.folder,
        default="out",
        help="folder for digits.csv and digits.png (out)",
    )
    add(
        "--epochs",
        type=arguments.integer(1, 1000),
        default=6,
        help="epochs of each of the two runs (6)",
    )
    add(
        "--seed",
        type=arguments.integer(0, 2**32 - 1),
        default=0,
        help="seed of weights and order (0)",
    )
    add("--device", type=arguments.device, default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    add(
        "--images",
        type=arguments.integer(BATCH, TRAIN_IMAGES),
        default=TRAIN_IMAGES,
        help=f"how many of the {TRAIN_IMAGES} training images to use (all)",
    )
    add(
        "--min-accuracy",
        type=arguments.fraction,
        default=0.95,
        help="both final test accuracies must be above this (0.95)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe and return its exit status."""
    args = parse_arguments(argv)
    data = load_data(args.images, args.device)
    plain, fused = (
        train(build(is_fused, args.seed, args.device), data, args.epochs, args.seed, name)
        for name, is_fused in (("plain", False), ("fused", True))
    )
    print(table(plain, fused))
    print(f"trained in {plain.seconds:.1f} s plain, {fused.seconds:.1f} s fused")
    for name, content in (("csv", curves_csv(plain, fused)), ("png", curves_png(plain, fused))):
        path = args.out / f"digits.{name}"
        write_atomically(path, content)
        print(f"wrote {path}")
    failures = find_failures(plain, fused, args.min_accuracy)
    for failure in failures:
        print(f"digits: {failure}", file=sys.stderr)
    if not failures:
        difference = largest_difference(plain, fused)
        print(f"the two runs agree: no loss differs by more than {difference:.1e}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
