"""With DistributedDataParallel, two processes compute the gradients of the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import epsanet_fused as ef

PROCESSES = 2


def make_model() -> ef.EPSANet:
    """Norms are in eval mode, so that samples do not depend on the rest of their batch."""
    torch.manual_seed(0)
    return ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 5, planes=(64,) * 4).double().eval()


def images() -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2 * PROCESSES, 3, 32, 32, generator=g, dtype=torch.float64)


def gradients(model: torch.nn.Module, batch: Tensor) -> list[Tensor]:
    model(batch).square().mean().backward()
    return [p.grad for p in model.parameters()]


def train_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    try:
        model = DistributedDataParallel(make_model())
        torch.save(gradients(model, images().chunk(PROCESSES)[rank]), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(train_process, args=(str(tmp_path),), nprocs=PROCESSES)
    expected = gradients(make_model(), images())
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
