"""Train and evaluate an EPSANet detector on COCO or another dataset in its format.

    python recipes/detection.py DATA --detector maskrcnn --weights imagenet.pth.tar --out out
    torchrun --nproc-per-node 8 recipes/detection.py DATA --weights imagenet.pth.tar --out out
    python recipes/detection.py DATA --out out --resume out/checkpoint.pth.tar
    python recipes/detection.py DATA --eval --resume out/model_best.pth.tar

DATA holds train2017/, val2017/ and annotations/instances_{train,val}2017.json. The defaults are the
published schedule: 12 epochs of SGD with a batch of 16 over all processes; a learning rate of 0.02
(RetinaNet 0.01) with 500 steps of warm-up, divided by ten after epochs 8 and 11; images with a
shorter side of 800 and a longer side of at most 1333 pixels, flipped with probability 0.5; stem,
first stage and all norms frozen. --lr is not scaled with the batch size. --weights is a checkpoint
of the backbone, from the recipe for classification or an official one.

After each epoch the recipe writes checkpoint.pth.tar (official layout), model_best.pth.tar (by box
AP) and log.csv to OUT. An interrupted run continues with --resume and reaches the same result. N
processes reach the same result as one process with --accumulate N. Evaluation runs one image at a
time: a batch would pad the smaller images, and the attention would average over the padding.

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
from arguments import existing_file, existing_folder, fraction, integer, non_negative, positive
from checkpointing import Checkpointer
from coco_dataset import (
    CocoAnnotations,
    EvaluationDataset,
    Target,
    TrainingDataset,
    check_same_categories,
    read_annotations,
)
from coco_metrics import Result, average_precision, to_coco_results
from distributed import (
    EvaluationBatchSampler,
    InputError,
    SeededDataset,
    TrainingBatchSampler,
    World,
    derive_seed,
    first_line,
    init_distributed,
    make_loader,
    run,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from training import AverageMeter, Trainer, autocast, load_weights, merge_groups, progress_bar

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
# torchvision's names of the terms of each loss.
_TWO_STAGE = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
LOSSES = {
    "fasterrcnn": _TWO_STAGE,
    "retinanet": ("classification", "bbox_regression"),
    "maskrcnn": (*_TWO_STAGE, "loss_mask"),
}
# The published highest learning rates, for a batch of 16.
LEARNING_RATES = {"fasterrcnn": 0.02, "retinanet": 0.01, "maskrcnn": 0.02}
WARMUP_START = 0.001  # the warm-up's first factor of the learning rate
# Modules whose outputs become box coordinates: bfloat16 would round pixel 1100 to 1096 or 1104.
FLOAT32_OUTPUTS = ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "head")
# Options that don't change the results. (--accumulate does by micro_batch, which is compared.)
NOT_COMPARED = {"data", "train_images", "val_images", "train_annotations", "val_annotations"}
NOT_COMPARED |= {"out", "resume", "weights", "eval", "workers", "device", "accumulate"}
Batch = tuple[tuple[Tensor, ...], tuple[Target, ...]]


def build(args: argparse.Namespace, annotations: CocoAnnotations) -> nn.Module:
    """Build the detector for the dataset's categories, with --weights in its backbone.

    Raises:
        InputError: if --weights can't be read or doesn't fit.
    """
    torch.manual_seed(derive_seed(args.seed))
    try:
        model = DETECTORS[args.detector](
            arch=args.model,
            num_classes=1 + len(annotations.categories),
            weights_backbone=args.weights,
            trainable_backbone_layers=args.trainable_layers,
            min_size=args.min_size,
            max_size=args.max_size,
        )
    except Exception as error:  # a damaged file raises errors of many types
        if args.weights is None:
            raise
        raise InputError(f"--weights {args.weights}: {first_line(error)}") from None
    for name, module in model.named_modules():
        if name in FLOAT32_OUTPUTS:
            module.register_forward_hook(_to_float32)
    return model


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, outputs)


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Return the memory format of the weights."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def arch_name(args: argparse.Namespace) -> str:
    """Return the detector's name for the checkpoint, such as retinanet_epsanet50_fpn."""
    return f"{args.detector}_{args.model}_fpn"


def learning_rate(args: argparse.Namespace, epoch: int, step: int, steps: int) -> float:
    """Return the learning rate of a step; epoch and step are counted from 0."""
    rate = args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
    done = epoch * steps + step
    if done < args.warmup_steps:
        rate *= WARMUP_START + (1 - WARMUP_START) * done / args.warmup_steps
    return rate


def read_split(args: argparse.Namespace, split: str, world: World) -> CocoAnnotations:
    """Read the annotations of the split "train" or "val"."""
    path = args.data / getattr(args, f"{split}_annotations")
    world.print(f"reading {path}")
    images = args.data / getattr(args, f"{split}_images")
    return read_annotations(path, images, masks=args.detector == "maskrcnn")


def collate(samples: Sequence[tuple[Any, Any]]) -> tuple[tuple[Any, ...], ...]:
    """Transpose samples into images and targets; the detector itself batches unequal images."""
    return tuple(zip(*samples, strict=True))


def train_epoch(
    args: argparse.Namespace, trainer: Trainer, loader: DataLoader[Batch], epoch: int
) -> dict[str, Any]:
    """Train for one epoch and return its row of the log, without the evaluation."""
    world = trainer.world
    meter = AverageMeter(world, "loss", *LOSSES[args.detector])

    def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
        images, targets = batch
        images = [image.to(world.device, non_blocking=True) for image in images]
        targets = [
            {key: value.to(world.device, non_blocking=True) for key, value in target.items()}
            for target in targets
        ]
        terms = model(images, targets)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        sums = {name: len(images) * term for name, term in {"loss": loss, **terms}.items()}
        meter.update(len(images), **sums)
        return loss

    speed = trainer.epoch(
        epoch, args.epochs, loader, partial(learning_rate, args, epoch), mean_loss, meter
    )
    rate = trainer.optimizer.param_groups[0]["lr"]
    return {"lr": rate, **meter.compute(), "images_per_s": speed}


@torch.no_grad()
def evaluate(
    args: argparse.Namespace, model: nn.Module, annotations: CocoAnnotations, world: World
) -> dict[str, float]:
    """Return the average precisions in percent over the images of all processes, in each process.

    The first process computes them; the others wait.
    """
    data = EvaluationDataset(annotations)
    gathered = world.all_gather(_detect(args, model, data, world))
    averages = None
    if world.is_first:
        # In the order of the images, as in one process: with equal scores the first result wins.
        index = {image_id: n for n, image_id in enumerate(data.ids)}
        results = {
            kind: sorted(
                chain.from_iterable(own[kind] for own in gathered),
                key=lambda result: index[result["image_id"]],
            )
            for kind in gathered[0]
        }
        averages = average_precision(annotations.coco, results)
    return world.all_gather(averages)[0]


def _detect(
    args: argparse.Namespace, model: nn.Module, data: EvaluationDataset, world: World
) -> dict[str, list[Result]]:
    """Run the detector on this process's images; return COCO results of boxes and masks."""
    sampler = EvaluationBatchSampler(len(data), 1, world)
    loader = make_loader(data, sampler, args.workers, world, collate)
    categories = data.annotations.categories
    results = {"box": [], "mask": []} if args.detector == "maskrcnn" else {"box": []}
    model.eval()
    with progress_bar(world, len(loader), "evaluate") as bar:
        for images, [image_id] in loader:
            with autocast(world, args.amp):
                [detections] = model([image.to(world.device) for image in images])
            for kind, found in to_coco_results(image_id, detections, categories).items():
                results[kind] += found
            bar.update()
    return results


def summary(averages: dict[str, float]) -> str:
    """Return the average precisions as one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in averages.items())


def make_trainer(args: argparse.Namespace, model: nn.Module, world: World) -> Trainer:
    """Build the SGD optimizer of the trainable parameters and the trainer."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    return Trainer(
        model, optimizer, world, seed=args.seed, accumulate=args.accumulate, amp=args.amp
    )


def typical_images(args: argparse.Namespace, count: int, world: World) -> Tensor:
    """Return random images of the most common size: aspect 3:4, sides in multiples of 32."""
    sides = (args.min_size, min(args.max_size, args.min_size * 4 // 3))
    height, width = (math.ceil(side / 32) * 32 for side in sides)
    images = torch.randn(count, 3, height, width, device=world.device)
    return images.to(memory_format=memory_format(args))


def train(args: argparse.Namespace, world: World) -> None:
    """Train, and evaluate and save after each epoch."""
    annotations, val = read_split(args, "train", world), read_split(args, "val", world)
    check_same_categories(annotations, val)
    # Fail before the first epoch if the evaluation can't run.
    average_precision(val.coco, {"box": []})
    EvaluationDataset(val)
    data = TrainingDataset(annotations, masks=args.detector == "maskrcnn")
    world.print(f"training on {len(data)} images, evaluating on {len(val.coco.imgs)}")
    sampler = TrainingBatchSampler(len(data), args.batch_size, world, args.seed, args.accumulate)
    loader = make_loader(SeededDataset(data, args.seed), sampler, args.workers, world, collate)
    options = {k: v for k, v in vars(args).items() if k not in NOT_COMPARED}
    options |= {"micro_batch": sampler.micro_batch_size, "categories": annotations.categories}
    checkpointer = Checkpointer(args.out, world, arch_name(args), options, args.resume)
    model = build(args, annotations).to(world.device, memory_format=memory_format(args))
    if args.merge_groups:
        images = typical_images(args, sampler.micro_batch_size, world)
        merge_groups(model.backbone, images, world, args.amp, checkpointer.plans)
    trainer = make_trainer(args, model, world)
    if args.resume:
        checkpointer.resume(trainer, args.resume)
    elif args.weights is None and args.trainable_layers < 5:
        world.print("without --weights, the frozen layers stay random: see --trainable-layers")
    if checkpointer.epoch >= args.epochs:
        raise InputError(
            f"--resume {args.resume} has finished epoch {checkpointer.epoch}: --epochs must be "
            f"more than that, got {args.epochs}"
        )
    with checkpointer.resume_advice():
        for epoch in range(checkpointer.epoch, args.epochs):
            row = train_epoch(args, trainer, loader, epoch)
            averages = evaluate(args, model, val, world)
            checkpointer.save(trainer, row | averages, averages["box_AP"])
            world.print(f"epoch {epoch + 1}: loss {row['loss']:.4f}  {summary(averages)}")


def evaluate_only(args: argparse.Namespace, world: World) -> None:
    """Evaluate a checkpoint on the split "val"."""
    val = read_split(args, "val", world)
    model = build(args, val)
    entries = load_weights(model, args.resume, "--resume")
    categories = entries.get("options", {}).get("categories", val.categories)
    if categories != val.categories:
        raise InputError(
            f"--resume {args.resume} was trained on the categories {categories}, and {val.path} "
            f"has {val.categories}"
        )
    model.to(world.device, memory_format=memory_format(args))
    world.print(summary(evaluate(args, model, val, world)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with a message on errors."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s DATA [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = integer(1, 2**20)
    add("data", type=existing_folder, metavar="DATA", help="root of the next four paths")
    add("--train-images", type=Path, default="train2017", help="folder in DATA (train2017)")
    add("--val-images", type=Path, default="val2017", help="folder in DATA (val2017)")
    for split in ("train", "val"):
        path = f"annotations/instances_{split}2017.json"
        add(f"--{split}-annotations", type=Path, default=path, help=f"file in DATA ({path})")
    add("--detector", choices=DETECTORS, default="fasterrcnn", help="detector (fasterrcnn)")
    add("--model", choices=ARCHITECTURES, default="epsanet50", help="backbone (epsanet50)")
    add("--out", type=Path, default=Path("out"), help="folder for checkpoints and log.csv (out)")
    add("--epochs", type=count, default=12, help="epochs in all (12)")
    add("--batch-size", type=count, default=16, help="images of a step, over all processes (16)")
    add("--accumulate", type=count, default=1, help="micro-batches of a step in each process (1)")
    add("--lr", type=positive, help="highest learning rate (0.02, RetinaNet 0.01)")
    milestones_help = "epochs after which the learning rate is divided by ten (8 11)"
    add("--milestones", type=count, nargs="*", default=[8, 11], metavar="N", help=milestones_help)
    add("--warmup-steps", type=integer(0, 2**20), default=500, help="linear warm-up steps (500)")
    add("--momentum", type=fraction, default=0.9, help="momentum of SGD (0.9)")
    add("--weight-decay", type=non_negative, default=1e-4, help="weight decay of SGD (1e-4)")
    layers_help = "stages of the backbone to train, counted from the last; 5 adds the stem (3)"
    add("--trainable-layers", type=integer(0, 5), default=3, help=layers_help)
    add("--min-size", type=integer(32, 2**14), default=800, help="shorter side of images (800)")
    add("--max-size", type=integer(32, 2**14), default=1333, help="longest side of images (1333)")
    add("--amp", action="store_true", help="mixed precision: float16, or bfloat16 on cpu")
    add("--channels-last", action="store_true", help="weights in channels_last")
    merge_help = "merge groups of convolutions where that trains faster; measured once, then kept"
    add("--merge-groups", action="store_true", help=f"{merge_help} in OUT/plans.json")
    add("--workers", type=integer(0, 1024), default=4, help="DataLoader workers per process (4)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="random seed (0)")
    add("--device", help="cpu, cuda, ... (cuda where it is available)")
    add("--eval", action="store_true", help="only evaluate --resume on the split val")
    start = parser.add_mutually_exclusive_group()
    add = start.add_argument
    add("--resume", type=existing_file, metavar="FILE", help="checkpoint to continue from")
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
    """Run the recipe and return its exit status."""
    args = parse_arguments(argv)

    def body() -> None:
        with init_distributed(args.device) as world:
            (evaluate_only if args.eval else train)(args, world)

    return run("detection", body)


if __name__ == "__main__":
    sys.exit(main())
