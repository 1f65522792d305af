"""Train and evaluate EPSANet on ImageNet or another folder of images.

    python recipes/classification.py DATA --out out
    torchrun --nproc-per-node 8 recipes/classification.py DATA --out out
    python recipes/classification.py DATA --out out --resume out/checkpoint.pth.tar
    python recipes/classification.py DATA --eval --weights out/model_best.pth.tar
    python recipes/classification.py DATA --out mine --weights imagenet.pth.tar --lr 0.01

DATA holds train/CLASS/* and val/CLASS/*. The defaults are the published recipe: 120 epochs of SGD
with a batch of 256 over all processes, a learning rate of 0.1 that is divided by ten every 30
epochs, label smoothing 0.1 and crops of 224 pixels. --lr is not scaled with the batch size.

After each epoch the recipe writes checkpoint.pth.tar (official layout), model_best.pth.tar and
log.csv to OUT. An interrupted run continues with --resume and reaches the same result. N processes
reach the same result as one process with --accumulate N.

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
from arguments import existing_file, existing_folder, fraction, integer, non_negative, positive
from checkpointing import Checkpointer
from distributed import (
    EvaluationBatchSampler,
    InputError,
    SeededDataset,
    TrainingBatchSampler,
    World,
    derive_seed,
    init_distributed,
    make_loader,
    run,
)
from imagefolder import check_same_classes, load_train, load_val
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import AverageMeter, Trainer, autocast, load_weights, merge_groups, progress_bar

import epsanet_fused as ef
from epsanet_fused.nn.checkpoint import read_checkpoint
from epsanet_fused.nn.epsanet import ARCHITECTURES

# Options that don't change the results. (--accumulate does by micro_batch, which is compared.)
NOT_COMPARED = {"data", "out", "resume", "weights", "eval", "workers", "device", "accumulate"}
Batch = tuple[Tensor, Tensor]


def build(args: argparse.Namespace, classes: int) -> ef.EPSANet:
    """Build the model on the CPU with the random weights of --seed."""
    torch.manual_seed(derive_seed(args.seed))
    return getattr(ef, args.model)(num_classes=classes)


def load_pretrained(model: ef.EPSANet, path: Path, world: World) -> None:
    """Load weights; keep the model's classifier if theirs has another number of classes."""
    classifier = model.fc
    classes = _count_classes(path)
    if classes not in (None, classifier.out_features):
        model.fc = nn.Linear(classifier.in_features, classes)
    load_weights(model, path, "--weights")
    if model.fc is not classifier:
        model.fc = classifier
        world.print(
            f"--weights {path}: dropped fc.weight and fc.bias, which are for {classes} classes; "
            f"the data have {classifier.out_features}"
        )


def _count_classes(path: Path) -> int | None:
    try:
        state, _ = read_checkpoint(path)
        return len(state["fc.weight"])
    except Exception:  # load_weights raises it again, with the option's name
        return None


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Return the memory format of images and weights."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def learning_rate(args: argparse.Namespace, epoch: int, step: int, steps: int) -> float:
    """Return the learning rate of a step; epoch and step are counted from 0."""
    done = epoch + step / steps
    if done < args.warmup_epochs:
        return args.lr * (done + 1 / steps) / args.warmup_epochs
    if args.schedule == "step":
        return args.lr * 0.1 ** (epoch // args.step_epochs)
    progress = (done - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def accuracy_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return top-1 and top-5 accuracy in percent, summed over the samples.

    Args:
        logits: (B, classes). With fewer than five classes, top-5 counts all of them.
        labels: (B,).
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5), the highest first
    hits = (best == labels[:, None]).double()
    return {"top1": 100 * hits[:, 0].sum(), "top5": 100 * hits.sum()}


def make_transfer(args: argparse.Namespace, world: World) -> Callable[[Batch], Batch]:
    """Return a function that copies a batch to the device."""

    def transfer(batch: Batch) -> Batch:
        images, labels = batch
        images = images.to(world.device, non_blocking=True, memory_format=memory_format(args))
        return images, labels.to(world.device, non_blocking=True)

    return transfer


def train_epoch(
    args: argparse.Namespace, trainer: Trainer, loader: DataLoader[Batch], epoch: int
) -> dict[str, Any]:
    """Train for one epoch and return its row of the log, without the evaluation."""
    world = trainer.world
    meter = AverageMeter(world, "loss", "top1")
    transfer = make_transfer(args, world)

    def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = transfer(batch)
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
        top1 = accuracy_sums(logits.detach(), labels)["top1"]
        meter.update(len(labels), loss=loss * len(labels), top1=top1)
        return loss

    speed = trainer.epoch(
        epoch, args.epochs, loader, partial(learning_rate, args, epoch), mean_loss, meter
    )
    result = meter.compute()
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
    """Return cross-entropy, top-1 and top-5 over the images of all processes, in each of them."""
    meter = AverageMeter(world, "val_loss", "top1", "top5")
    transfer = make_transfer(args, world)
    model.eval()
    with progress_bar(world, len(loader), "evaluate") as bar:
        for batch in loader:
            images, labels = transfer(batch)
            with autocast(world, args.amp):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            meter.update(len(labels), val_loss=loss, **accuracy_sums(logits, labels))
            bar.update()
    return meter.compute()


def peak_memory(world: World) -> float | str:
    """Return this process's peak of GPU memory in MiB since the last call, "" without a GPU."""
    if world.device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated(world.device) / 2**20
    torch.cuda.reset_peak_memory_stats(world.device)
    return round(peak, 1)


def make_trainer(args: argparse.Namespace, model: nn.Module, world: World) -> Trainer:
    """Build the SGD optimizer and the trainer."""
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
    """Train, and evaluate and save after each epoch."""
    data, val = load_train(args.data, args.image_size), load_val(args.data, args.image_size)
    check_same_classes(data, val)
    sampler = TrainingBatchSampler(len(data), args.batch_size, world, args.seed, args.accumulate)
    loader = make_loader(SeededDataset(data, args.seed), sampler, args.workers, world)
    val_sampler = EvaluationBatchSampler(len(val), sampler.micro_batch_size, world)
    val_loader = make_loader(val, val_sampler, args.workers, world)
    options = {k: v for k, v in vars(args).items() if k not in NOT_COMPARED}
    options |= {"micro_batch": sampler.micro_batch_size, "classes": data.classes}
    checkpointer = Checkpointer(args.out, world, args.model, options, args.resume)
    model = build(args, len(data.classes))
    if args.weights:
        load_pretrained(model, args.weights, world)
    model.to(world.device, memory_format=memory_format(args))
    if args.merge_groups:
        size = (sampler.micro_batch_size, 3, args.image_size, args.image_size)
        images = torch.randn(size, device=world.device).to(memory_format=memory_format(args))
        merge_groups(model, images, world, args.amp, checkpointer.plans)
    trainer = make_trainer(args, model, world)
    if args.resume:
        checkpointer.resume(trainer, args.resume)
    if checkpointer.epoch >= args.epochs:
        raise InputError(
            f"--resume {args.resume} has finished epoch {checkpointer.epoch}: --epochs must be "
            f"more than that, got {args.epochs}"
        )
    with checkpointer.resume_advice():
        for epoch in range(checkpointer.epoch, args.epochs):
            row = train_epoch(args, trainer, loader, epoch)
            row |= evaluate(args, trainer.eval_model, val_loader, world)
            checkpointer.save(trainer, row | {"peak_memory_mb": peak_memory(world)}, row["top1"])
            world.print(
                f"epoch {epoch + 1}: train_loss {row['train_loss']:.4f}  val_loss "
                f"{row['val_loss']:.4f}  top1 {row['top1']:.2f}  top5 {row['top5']:.2f}"
            )


def evaluate_only(args: argparse.Namespace, world: World) -> None:
    """Evaluate a checkpoint on DATA/val; the moving average if the checkpoint has one."""
    val = load_val(args.data, args.image_size)
    model = build(args, len(val.classes))
    option, path = ("--weights", args.weights) if args.weights else ("--resume", args.resume)
    entries = load_weights(model, path, option)
    if entries.get("options", {}).get("classes", val.classes) != val.classes:
        raise InputError(f"{option} {path} was trained on other classes than {val.root} has")
    model.to(world.device, memory_format=memory_format(args))
    sampler = EvaluationBatchSampler(len(val), max(1, args.batch_size // world.size), world)
    result = evaluate(args, model, make_loader(val, sampler, args.workers, world), world)
    world.print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with a message on errors."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s DATA [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = integer(1, 2**20)
    add("data", type=existing_folder, metavar="DATA", help="folder with train/ and val/")
    add("--model", choices=ARCHITECTURES, default="epsanet50", help="architecture (epsanet50)")
    add("--out", type=Path, default=Path("out"), help="folder for checkpoints and log.csv (out)")
    add("--epochs", type=count, default=120, help="epochs in all (120)")
    add("--batch-size", type=count, default=256, help="images of a step, over all processes (256)")
    add("--accumulate", type=count, default=1, help="micro-batches of a step in each process (1)")
    add("--lr", type=positive, default=0.1, help="highest learning rate (0.1)")
    add("--schedule", choices=("step", "cosine"), default="step", help="of learning rate (step)")
    add("--step-epochs", type=count, default=30, help="epochs between two divisions by ten (30)")
    add("--warmup-epochs", type=integer(0, 2**20), default=0, help="epochs of linear warm-up (0)")
    add("--momentum", type=fraction, default=0.9, help="momentum of SGD (0.9)")
    add("--weight-decay", type=non_negative, default=1e-4, help="weight decay of SGD (1e-4)")
    add("--label-smoothing", type=fraction, default=0.1, help="label smoothing in training (0.1)")
    add("--image-size", type=integer(32, 4096), default=224, help="crop size in pixels (224)")
    add("--amp", action="store_true", help="mixed precision: float16, or bfloat16 on cpu")
    add("--channels-last", action="store_true", help="images and weights in channels_last")
    merge_help = "merge groups of convolutions where that trains faster; measured once, then kept"
    add("--merge-groups", action="store_true", help=f"{merge_help} in OUT/plans.json")
    add("--ema", type=fraction, metavar="DECAY", help="evaluate and save a moving average")
    add("--workers", type=integer(0, 1024), default=4, help="DataLoader workers per process (4)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="random seed (0)")
    add("--device", help="cpu, cuda, ... (cuda where it is available)")
    add("--eval", action="store_true", help="only evaluate --weights or --resume on DATA/val")
    start = parser.add_mutually_exclusive_group()
    add = start.add_argument
    add("--resume", type=existing_file, metavar="FILE", help="checkpoint to continue from")
    add("--weights", type=existing_file, metavar="FILE", help="checkpoint to start a new run from")
    args = parser.parse_args(argv)
    if args.eval and not (args.resume or args.weights):
        parser.error("--eval needs --weights FILE or --resume FILE")
    if args.warmup_epochs >= args.epochs:
        parser.error(
            f"--warmup-epochs must be less than --epochs, got {args.warmup_epochs} of {args.epochs}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe and return its exit status."""
    args = parse_arguments(argv)

    def body() -> None:
        with init_distributed(args.device) as world:
            torch.backends.cudnn.benchmark = True
            (evaluate_only if args.eval else train)(args, world)

    return run("classification", body)


if __name__ == "__main__":
    sys.exit(main())
