"""Train EPSANet on ImageNet, or on any folder of images, and evaluate it.

    python recipes/classification.py DATA --out out
    torchrun --nproc-per-node 8 recipes/classification.py DATA --out out
    python recipes/classification.py DATA --out out --resume out/checkpoint.pth.tar
    python recipes/classification.py DATA --eval --weights out/model_best.pth.tar
    python recipes/classification.py DATA --out mine --weights imagenet.pth.tar --lr 0.01

DATA holds train/CLASS/* and val/CLASS/*. The defaults are the published recipe: 120 epochs of SGD
in batches of 256, over all processes, the learning rate 0.1 divided by ten every 30 epochs, label
smoothing 0.1, crops of 224 pixels. --lr is for the whole batch and isn't scaled with it.

OUT gets, after each epoch, checkpoint.pth.tar (official layout), model_best.pth.tar and log.csv.
A run that ended anyhow goes on with --resume and gets to the same result. Several processes get to
the result of one with --accumulate as many.

Needs torchvision and tqdm.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arguments import existing_file, existing_folder, integer, not_negative, positive, share
from imagefolder import check_classes, load_train, load_val
from processes import (
    EvaluationBatches,
    InputError,
    Seeded,
    TrainingBatches,
    World,
    joined,
    make_loader,
    mix,
    run,
)
from record import Record
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import Means, Trainer, autocast, load_weights, merge_groups, progress_bar

import epsanet_fused as ef
from epsanet_fused.nn.checkpoint import read_checkpoint
from epsanet_fused.nn.epsanet import ARCHITECTURES

# What a run's numbers don't hang on, or hang on through the micro-batch alone.
ELSEWHERE = {"data", "out", "resume", "weights", "eval", "workers", "device", "accumulate"}
Batch = tuple[Tensor, Tensor]


def build(args: argparse.Namespace, classes: int) -> ef.EPSANet:
    """The model as --seed draws it, on the CPU."""
    torch.manual_seed(mix(args.seed))
    return getattr(ef, args.model)(num_classes=classes)


def fine_tune(model: ef.EPSANet, path: Path, world: World) -> None:
    """Load weights; a classifier of another number of classes is left as it was drawn."""
    drawn = model.fc
    given = _classes(path)
    if given not in (None, drawn.out_features):
        model.fc = nn.Linear(drawn.in_features, given)
    load_weights(model, path, "--weights")
    if model.fc is not drawn:
        model.fc = drawn
        world.say(
            f"--weights {path}: dropped fc.weight and fc.bias, which are for {given} classes; the "
            f"data have {drawn.out_features}"
        )


def _classes(path: Path) -> int | None:
    try:
        state, _ = read_checkpoint(path)
        return len(state["fc.weight"])
    except Exception:  # whatever it is, load_weights will meet it and name it
        return None


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def learning_rate(args: argparse.Namespace, epoch: int, step: int, steps: int) -> float:
    """For a step of an epoch of ``steps``, both counted from 0."""
    done = epoch + step / steps
    if done < args.warmup_epochs:
        return args.lr * (done + 1 / steps) / args.warmup_epochs
    if args.schedule == "step":
        return args.lr * 0.1 ** (epoch // args.step_epochs)
    share_done = (done - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * 0.5 * (1 + math.cos(math.pi * share_done))


def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Top-1 and top-5 accuracy in percent, summed; top-5 of fewer classes is of all of them.

    Args:
        logits: (B, classes).
        labels: (B,).
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5), the highest first
    hits = (best == labels[:, None]).double()
    return {"top1": 100 * hits[:, 0].sum(), "top5": 100 * hits.sum()}


def mover(args: argparse.Namespace, world: World) -> Callable[[Batch], Batch]:
    """Takes a batch to the device."""

    def move(batch: Batch) -> Batch:
        images, labels = batch
        images = images.to(world.device, non_blocking=True, memory_format=memory_format(args))
        return images, labels.to(world.device, non_blocking=True)

    return move


def train_epoch(
    args: argparse.Namespace, trainer: Trainer, loader: DataLoader[Batch], epoch: int
) -> dict[str, Any]:
    """One epoch; its row of the log, as far as training goes."""
    world = trainer.world
    means = Means(world, "loss", "top1")
    move = mover(args, world)

    def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = move(batch)
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
        means.add(
            len(labels), loss=loss * len(labels), top1=scores(logits.detach(), labels)["top1"]
        )
        return loss

    speed = trainer.epoch(
        epoch, args.epochs, loader, partial(learning_rate, args, epoch), mean_loss, means
    )
    result = means.all()
    return {
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "train_loss": result["loss"],
        "train_top1": result["top1"],
        "images_per_s": speed,
    }


@torch.no_grad()
def evaluate(
    args: argparse.Namespace, model: nn.Module, loader: DataLoader[Batch], world: World
) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 over all images of the loaders of all processes."""
    means = Means(world, "val_loss", "top1", "top5")
    move = mover(args, world)
    model.eval()
    with progress_bar(world, len(loader), "evaluate") as bar:
        for batch in loader:
            images, labels = move(batch)
            with autocast(world, args.amp):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            means.add(len(labels), val_loss=loss, **scores(logits, labels))
            bar.update()
    return means.all()


def peak_memory(world: World) -> float | str:
    """MiB of this process on its card since it was last asked."""
    if world.device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated(world.device) / 2**20
    torch.cuda.reset_peak_memory_stats(world.device)
    return round(peak, 1)


def make_trainer(args: argparse.Namespace, model: nn.Module, world: World) -> Trainer:
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    return Trainer(
        model,
        optimizer,
        world,
        seed=args.seed,
        accumulate=args.accumulate,
        amp=args.amp,
        ema_decay=args.ema,
    )


def train(args: argparse.Namespace, world: World) -> None:
    data, val = load_train(args.data, args.image_size), load_val(args.data, args.image_size)
    check_classes(data, val)
    dealt = TrainingBatches(len(data), args.batch_size, world, args.seed, args.accumulate)
    loader = make_loader(Seeded(data, args.seed), dealt, args.workers, world)
    val_batches = EvaluationBatches(len(val), dealt.micro, world)
    val_loader = make_loader(val, val_batches, args.workers, world)
    options = {k: v for k, v in vars(args).items() if k not in ELSEWHERE}
    options |= {"micro_batch": dealt.micro, "classes": data.classes}
    record = Record(args.out, world, args.model, options, args.resume)
    model = build(args, len(data.classes))
    if args.weights:
        fine_tune(model, args.weights, world)
    model.to(world.device, memory_format=memory_format(args))
    if args.merge_groups:
        size = (dealt.micro, 3, args.image_size, args.image_size)
        images = torch.randn(size, device=world.device).to(memory_format=memory_format(args))
        merge_groups(model, images, world, args.amp, record.plans)
    trainer = make_trainer(args, model, world)
    if args.resume:
        record.resume(trainer, args.resume)
    if record.epoch >= args.epochs:
        raise InputError(
            f"--resume {args.resume} has finished epoch {record.epoch}: --epochs must be more than "
            f"that, got {args.epochs}"
        )
    with record.advising():
        for epoch in range(record.epoch, args.epochs):
            row = train_epoch(args, trainer, loader, epoch)
            row |= evaluate(args, trainer.evaluated, val_loader, world)
            record.save(trainer, row | {"peak_memory_mb": peak_memory(world)}, row["top1"])
            world.say(
                f"epoch {epoch + 1}: train_loss {row['train_loss']:.4f}  val_loss "
                f"{row['val_loss']:.4f}  top1 {row['top1']:.2f}  top5 {row['top5']:.2f}"
            )


def evaluate_only(args: argparse.Namespace, world: World) -> None:
    """Needs DATA/val alone; of a checkpoint with an average, that is what is evaluated."""
    val = load_val(args.data, args.image_size)
    model = build(args, len(val.classes))
    option, path = ("--weights", args.weights) if args.weights else ("--resume", args.resume)
    rest = load_weights(model, path, option)
    if rest.get("options", {}).get("classes", val.classes) != val.classes:
        raise InputError(f"{option} {path} was trained on other classes than {val.root} has")
    model.to(world.device, memory_format=memory_format(args))
    batches = EvaluationBatches(len(val), max(1, args.batch_size // world.size), world)
    result = evaluate(args, model, make_loader(val, batches, args.workers, world), world)
    world.say("  ".join(f"{name} {value:.4f}" for name, value in result.items()))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s DATA [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = integer(1, 2**20)
    add("data", type=existing_folder, metavar="DATA", help="folder with train/ and val/")
    add("--model", choices=ARCHITECTURES, default="epsanet50", help="(epsanet50)")
    add("--out", type=Path, default=Path("out"), help="folder of checkpoints and log.csv (out)")
    add("--epochs", type=count, default=120, help="(120)")
    add("--batch-size", type=count, default=256, help="images of a step, in all processes (256)")
    add("--accumulate", type=count, default=1, help="micro-batches of a step in each process (1)")
    add("--lr", type=positive, default=0.1, help="learning rate at its highest (0.1)")
    add("--schedule", choices=("step", "cosine"), default="step", help="of the rate (step)")
    add("--step-epochs", type=count, default=30, help="epochs to a tenth of the rate (30)")
    add("--warmup-epochs", type=integer(0, 2**20), default=0, help="of a rising rate (0)")
    add("--momentum", type=share, default=0.9, help="(0.9)")
    add("--weight-decay", type=not_negative, default=1e-4, help="(1e-4)")
    add("--label-smoothing", type=share, default=0.1, help="in training (0.1)")
    add("--image-size", type=integer(32, 4096), default=224, help="of the crops, pixels (224)")
    add("--amp", action="store_true", help="float16 where it serves, on cpu bfloat16")
    add("--channels-last", action="store_true", help="memory format of images and weights")
    add("--merge-groups", action="store_true",
        help="of convolutions, where measured to be faster; kept in OUT/plans.json")  # fmt: skip
    add("--ema", type=share, metavar="DECAY", help="evaluate and keep an average of the weights")
    add("--workers", type=integer(0, 1024), default=4, help="that load data, per process (4)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="of all that is random (0)")
    add("--device", help="cpu, cuda, ... (cuda where there is one)")
    add("--eval", action="store_true", help="only evaluate --weights or --resume, on val/")
    start = parser.add_mutually_exclusive_group()
    add = start.add_argument
    add("--resume", type=existing_file, metavar="FILE", help="checkpoint to go on from")
    add("--weights", type=existing_file, metavar="FILE", help="checkpoint to start from")
    args = parser.parse_args(argv)
    if args.eval and not (args.resume or args.weights):
        parser.error("--eval needs --weights FILE or --resume FILE")
    if args.warmup_epochs >= args.epochs:
        parser.error(
            f"--warmup-epochs must be less than --epochs, got {args.warmup_epochs} of {args.epochs}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)

    def body() -> None:
        with joined(args.device) as world:
            torch.backends.cudnn.benchmark = True
            (evaluate_only if args.eval else train)(args, world)

    return run("classification", body)


if __name__ == "__main__":
    sys.exit(main())
