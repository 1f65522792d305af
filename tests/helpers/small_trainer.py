"""A small network and its trainer, for the tests of the recipes' training and checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from distributed import World
from torch import Tensor, nn
from training import Trainer

ONE_PROCESS = World(0, 1, torch.device("cpu"))


class Net(nn.Module):
    """BatchNorm, dropout and a linear layer: (B, 4) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(x)))


def make_trainer(**options: Any) -> Trainer:
    """Build a trainer of one process with the network in float64."""
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Trainer(model, optimizer, ONE_PROCESS, **options)


def make_batches(count: int) -> list[Tensor]:
    """Return the same ``count`` batches (5, 4) each time."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(count)]


def run_steps(trainer: Trainer, steps: int, start: int = 0) -> None:
    """Run steps of epoch 0, from the step ``start`` on."""

    def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    for step in range(start, start + steps):
        trainer.step((0, step), make_batches(trainer.accumulate), mean_square)
