"""Train an EPSANet detector on COCO, or on any data in its format, and evaluate it.

    python recipes/detection.py DATA --detector maskrcnn --weights imagenet.pth.tar --out out
    torchrun --nproc-per-node 8 recipes/detection.py DATA --weights imagenet.pth.tar --out out
    python recipes/detection.py DATA --out out --resume out/checkpoint.pth.tar
    python recipes/detection.py DATA --eval --resume out/model_best.pth.tar

DATA holds train2017/, val2017/ and annotations/instances_{train,val}2017.json. The defaults are the
published schedule: 12 epochs of SGD in batches of 16, over all processes, the learning rate 0.02
(RetinaNet 0.01) after 500 steps of warm-up, divided by ten after epochs 8 and 11; images of 800 to
1333 pixels, half of them mirrored; stem and first stage frozen, and the norms' statistics, weights
and biases.
--lr is for the whole batch and isn't scaled with it. --weights is what the backbone has learnt
elsewhere: a checkpoint of the recipe for classification, or an official one.

OUT gets, after each epoch, checkpoint.pth.tar (official layout), model_best.pth.tar (by box AP)
and log.csv. A run that ended anyhow goes on with --resume and gets to the same result. Several
processes get to the result of one with --accumulate as many. Evaluation takes images one by one: a
batch would fill up the smaller ones, and the attention averages over all there is.

Needs torchvision, pycocotools and tqdm.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from arguments import existing_file, existing_folder, integer, not_negative, positive, share
from cocoscores import average_precision, results_of
from cocoset import EvaluationSet, Target, TrainingSet, Truth, check_categories, read_truth
from processes import (
    EvaluationBatches,
    InputError,
    Seeded,
    TrainingBatches,
    World,
    first_line,
    joined,
    make_loader,
    mix,
    run,
)
from record import Record
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from training import Means, Trainer, autocast, load_weights, merge_groups, progress_bar

from epsanet_fused.integrations.torchvision import (
    fasterrcnn_epsanet50_fpn,
    maskrcnn_epsanet50_fpn,
    retinanet_epsanet50_fpn,
)
from epsanet_fused.nn.epsanet import ARCHITECTURES

DETECTORS = {
    "fasterrcnn": fasterrcnn_epsanet50_fpn,
    "retinanet": retinanet_epsanet50_fpn,
    "maskrcnn": maskrcnn_epsanet50_fpn,
}
# What torchvision calls the parts of each loss.
_TWO_STAGES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
LOSSES = {
    "fasterrcnn": _TWO_STAGES,
    "retinanet": ("classification", "bbox_regression"),
    "maskrcnn": (*_TWO_STAGES, "loss_mask"),
}
# At its highest, for batches of 16.
LEARNING_RATES = {"fasterrcnn": 0.02, "retinanet": 0.01, "maskrcnn": 0.02}
WARMUP_START = 0.001  # of the learning rate
# What says where the boxes are: in 16 bits, as --amp would have them, pixel 1100 is 1096 or 1104.
EXACT = ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "head")
# What a run's numbers don't hang on, or hang on through the micro-batch alone.
ELSEWHERE = {
    "data", "train_images", "val_images", "train_annotations", "val_annotations",
    "out", "resume", "weights", "eval", "workers", "device", "accumulate",
}  # fmt: skip
Batch = tuple[tuple[Tensor, ...], tuple[Target, ...]]


def build(args: argparse.Namespace, truth: Truth) -> nn.Module:
    """The detector for the categories of a set, its backbone with the weights of --weights."""
    torch.manual_seed(mix(args.seed))
    try:
        model = DETECTORS[args.detector](
            arch=args.model,
            num_classes=1 + len(truth.categories),
            weights_backbone=args.weights,
            trainable_backbone_layers=args.trainable_layers,
            min_size=args.min_size,
            max_size=args.max_size,
        )
    except Exception as error:  # a torn file raises errors of many types
        if args.weights is None:
            raise
        raise InputError(f"--weights {args.weights}: {first_line(error)}") from None
    for name, module in model.named_modules():
        if name in EXACT:
            module.register_forward_hook(_in_float32)
    return model


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, outputs)


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def name_of(args: argparse.Namespace) -> str:
    return f"{args.detector}_{args.model}_fpn"


def learning_rate(args: argparse.Namespace, epoch: int, step: int, steps: int) -> float:
    """For a step of an epoch of ``steps``, both counted from 0."""
    rate = args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
    done = epoch * steps + step
    if done < args.warmup_steps:
        rate *= WARMUP_START + (1 - WARMUP_START) * done / args.warmup_steps
    return rate


def read(args: argparse.Namespace, part: str, world: World) -> Truth:
    """The annotations of the part "train" or "val"."""
    path = args.data / getattr(args, f"{part}_annotations")
    world.say(f"reading {path}")
    images = args.data / getattr(args, f"{part}_images")
    return read_truth(path, images, masks=args.detector == "maskrcnn")


def collate(samples: Sequence[tuple[Any, Any]]) -> tuple[tuple[Any, ...], ...]:
    """Images of unlike sizes stay apart; the detector puts them together."""
    return tuple(zip(*samples, strict=True))


def train_epoch(
    args: argparse.Namespace, trainer: Trainer, loader: DataLoader[Batch], epoch: int
) -> dict[str, Any]:
    """One epoch; its row of the log, as far as training goes."""
    world = trainer.world
    means = Means(world, "loss", *LOSSES[args.detector])

    def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
        images, targets = batch
        images = [image.to(world.device, non_blocking=True) for image in images]
        targets = [
            {key: value.to(world.device, non_blocking=True) for key, value in target.items()}
            for target in targets
        ]
        parts = model(images, targets)
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        sums = {name: len(images) * part for name, part in {"loss": loss, **parts}.items()}
        means.add(len(images), **sums)
        return loss

    speed = trainer.epoch(
        epoch, args.epochs, loader, partial(learning_rate, args, epoch), mean_loss, means
    )
    rate = trainer.optimizer.param_groups[0]["lr"]
    return {"lr": rate, **means.all(), "images_per_s": speed}


@torch.no_grad()
def evaluate(
    args: argparse.Namespace, model: nn.Module, truth: Truth, world: World
) -> dict[str, float]:
    """The average precisions, in percent, over the images of all processes; in every process."""
    data = EvaluationSet(truth)
    batches = EvaluationBatches(len(data), 1, world)
    loader = make_loader(data, batches, args.workers, world, collate)
    own = {"box": [], "mask": []} if args.detector == "maskrcnn" else {"box": []}
    model.eval()
    with progress_bar(world, len(loader), "evaluate") as bar:
        for images, ids in loader:
            with autocast(world, args.amp):
                found = model([image.to(world.device) for image in images])
            for image_id, one in zip(ids, found, strict=True):
                for kind, results in results_of(image_id, one, truth.categories).items():
                    own[kind] += results
            bar.update()
    everyones = world.gather(own)
    averages = None
    if world.is_first:
        # By image, as one process finds them: of equal scores, the first wins.
        place = {image_id: n for n, image_id in enumerate(data.ids)}
        results = {
            kind: sorted(
                chain.from_iterable(one[kind] for one in everyones),
                key=lambda result: place[result["image_id"]],
            )
            for kind in own
        }
        averages = average_precision(truth.coco, results)
    return world.gather(averages)[0]


def summary(averages: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in averages.items())


def make_trainer(args: argparse.Namespace, model: nn.Module, world: World) -> Trainer:
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    return Trainer(
        model, optimizer, world, seed=args.seed, accumulate=args.accumulate, amp=args.amp
    )


def usual_images(args: argparse.Namespace, count: int, world: World) -> Tensor:
    """Noise of the size that most images come in: three by four, in multiples of 32 pixels."""
    sides = (args.min_size, min(args.max_size, args.min_size * 4 // 3))
    height, width = (math.ceil(side / 32) * 32 for side in sides)
    images = torch.randn(count, 3, height, width, device=world.device)
    return images.to(memory_format=memory_format(args))


def train(args: argparse.Namespace, world: World) -> None:
    truth, val = read(args, "train", world), read(args, "val", world)
    check_categories(truth, val)
    average_precision(val.coco, {"box": []})  # what can't be scored is to show before an epoch
    EvaluationSet(val)
    data = TrainingSet(truth, masks=args.detector == "maskrcnn")
    world.say(f"training on {len(data)} images, evaluating on {len(val.coco.imgs)}")
    dealt = TrainingBatches(len(data), args.batch_size, world, args.seed, args.accumulate)
    loader = make_loader(Seeded(data, args.seed), dealt, args.workers, world, collate)
    options = {k: v for k, v in vars(args).items() if k not in ELSEWHERE}
    options |= {"micro_batch": dealt.micro, "categories": truth.categories}
    record = Record(args.out, world, name_of(args), options, args.resume)
    model = build(args, truth).to(world.device, memory_format=memory_format(args))
    if args.merge_groups:
        images = usual_images(args, dealt.micro, world)
        merge_groups(model.backbone, images, world, args.amp, record.plans)
    trainer = make_trainer(args, model, world)
    if args.resume:
        record.resume(trainer, args.resume)
    elif args.weights is None and args.trainable_layers < 5:
        world.say("without --weights, what is frozen stays random: see --trainable-layers")
    if record.epoch >= args.epochs:
        raise InputError(
            f"--resume {args.resume} has finished epoch {record.epoch}: --epochs must be more than "
            f"that, got {args.epochs}"
        )
    with record.advising():
        for epoch in range(record.epoch, args.epochs):
            row = train_epoch(args, trainer, loader, epoch)
            averages = evaluate(args, model, val, world)
            record.save(trainer, row | averages, averages["box_AP"])
            world.say(f"epoch {epoch + 1}: loss {row['loss']:.4f}  {summary(averages)}")


def evaluate_only(args: argparse.Namespace, world: World) -> None:
    """Needs the part "val" alone."""
    truth = read(args, "val", world)
    model = build(args, truth)
    rest = load_weights(model, args.resume, "--resume")
    categories = rest.get("options", {}).get("categories", truth.categories)
    if categories != truth.categories:
        raise InputError(
            f"--resume {args.resume} was trained on the categories {categories}, and {truth.path} "
            f"has {truth.categories}"
        )
    model.to(world.device, memory_format=memory_format(args))
    world.say(summary(evaluate(args, model, truth, world)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s DATA [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = integer(1, 2**20)
    add("data", type=existing_folder, metavar="DATA", help="folder of the four that follow")
    add("--train-images", type=Path, default="train2017", help="folder in DATA (train2017)")
    add("--val-images", type=Path, default="val2017", help="folder in DATA (val2017)")
    for part in ("train", "val"):
        path = f"annotations/instances_{part}2017.json"
        add(f"--{part}-annotations", type=Path, default=path, help=f"in DATA ({path})")
    add("--detector", choices=DETECTORS, default="fasterrcnn", help="(fasterrcnn)")
    add("--model", choices=ARCHITECTURES, default="epsanet50", help="its backbone (epsanet50)")
    add("--out", type=Path, default=Path("out"), help="folder of checkpoints and log.csv (out)")
    add("--epochs", type=count, default=12, help="(12)")
    add("--batch-size", type=count, default=16, help="images of a step, in all processes (16)")
    add("--accumulate", type=count, default=1, help="micro-batches of a step in each process (1)")
    add("--lr", type=positive, help="learning rate at its highest (0.02, RetinaNet 0.01)")
    add("--milestones", type=count, nargs="*", default=[8, 11], metavar="EPOCHS",
        help="after how many the rate falls to a tenth (8 11)")  # fmt: skip
    add("--warmup-steps", type=integer(0, 2**20), default=500, help="of a rising rate (500)")
    add("--momentum", type=share, default=0.9, help="(0.9)")
    add("--weight-decay", type=not_negative, default=1e-4, help="(1e-4)")
    add("--trainable-layers", type=integer(0, 5), default=3,
        help="stages of the backbone to train, from the last; 5: the stem, too (3)")  # fmt: skip
    add("--min-size", type=integer(32, 2**14), default=800, help="an image's shorter side (800)")
    add("--max-size", type=integer(32, 2**14), default=1333, help="its longer, at most (1333)")
    add("--amp", action="store_true", help="float16 where it serves, on cpu bfloat16")
    add("--channels-last", action="store_true", help="memory format of the weights")
    add("--merge-groups", action="store_true",
        help="of convolutions, where measured to be faster; kept in OUT/plans.json")  # fmt: skip
    add("--workers", type=integer(0, 1024), default=4, help="that load data, per process (4)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="of all that is random (0)")
    add("--device", help="cpu, cuda, ... (cuda where there is one)")
    add("--eval", action="store_true", help="only evaluate --resume, on the part val")
    start = parser.add_mutually_exclusive_group()
    add = start.add_argument
    add("--resume", type=existing_file, metavar="FILE", help="checkpoint to go on from")
    add("--weights", type=existing_file, metavar="FILE", help="checkpoint of the backbone")
    args = parser.parse_args(argv)
    args.lr = args.lr or LEARNING_RATES[args.detector]
    if args.eval and not args.resume:
        parser.error("--eval needs --resume FILE")
    if args.max_size < args.min_size:
        parser.error(
            f"--max-size must be at least --min-size, got {args.max_size} for {args.min_size}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)

    def body() -> None:
        with joined(args.device) as world:
            (evaluate_only if args.eval else train)(args, world)

    return run("detection", body)


if __name__ == "__main__":
    sys.exit(main())
