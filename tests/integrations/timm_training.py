"""Train and validate as timm's train.py does, in small; only the model's name is EPSANet's.

    timm_training.py DATA OUT EPOCHS [CHECKPOINT to resume]

Each process writes its losses, accuracy and rank to a JSON file in OUT.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, init_distributed_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

NAME = "epsanet50"
CPU = torch.device("cpu")


def create_model() -> nn.Module:
    return timm.create_model(NAME, layers=(1, 1, 1, 1), num_classes=10, drop_rate=0.1)


def loader(data: str, split: str, model: nn.Module, distributed: bool) -> DataLoader:
    training = split == "train"
    config = resolve_data_config({"img_size": 32}, model=model)
    # Workers are seeded for each epoch, unless persistent: so a resumed run sees the same images.
    return create_loader(
        create_dataset("", data, split=split, is_training=training),
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        batch_size=16,
        is_training=training,
        num_workers=1,
        persistent_workers=False,
        distributed=distributed,
        use_prefetcher=False,
        device=CPU,
    )


@torch.no_grad()
def validate(model: nn.Module, data: str) -> float:
    """Return top-1 in percent on the validation images."""
    model.eval()
    outputs, labels = zip(
        *((model(x), y) for x, y in loader(data, "validation", model, False)), strict=True
    )
    return accuracy(torch.cat(outputs), torch.cat(labels))[0].item()


def train(data: str, out: str, epochs: int, resume: str | None) -> dict[str, object]:
    """Train to the end of the epoch ``epochs``, from a checkpoint if one is given."""
    args = Namespace(device="cpu", dist_backend="gloo", model=NAME)
    init_distributed_device(args)
    torch.manual_seed(0)
    model = create_model()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.02, weight_decay=1e-4, layer_decay=0.9)
    ema = ModelEmaV3(model, decay=0.5)
    first = resume_checkpoint(model, resume, optimizer) if resume else 0
    if resume:
        load_checkpoint(ema.module, resume, use_ema=True)
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=out)
    trained = DistributedDataParallel(model) if args.distributed else model
    losses = []
    for epoch in range(first, epochs):
        torch.manual_seed(100 + epoch)
        trained.train()
        for x, y in loader(data, "train", model, args.distributed):
            loss = F.cross_entropy(trained(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        top1 = validate(model, data)
        if args.rank == 0:
            saver.save_checkpoint(epoch, top1)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    total = sum(p.double().sum().item() for p in model.parameters())
    if args.distributed:
        dist.destroy_process_group()
    return {
        "losses": losses,
        "top1": top1,
        "lr_scales": len(scales),
        "total": total,
        "rank": args.rank,
        "world_size": args.world_size,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, out, epochs, *resume = sys.argv[1:]
    found = train(data, out, int(epochs), *(resume or [None]))
    Path(out, f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
