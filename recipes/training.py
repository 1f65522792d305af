"""What the recipes share of training: steps, running averages, checkpoints and the log.

A step is ``size * accumulate`` equal micro-batches, over ``size`` processes. Its loss and gradient
are their means, and so is what it adds to BatchNorm's running statistics; each micro-batch is
normalised by itself, as usual. So it doesn't matter to the numbers, but for rounding, whether N
processes share a step or one process takes N micro-batches (``accumulate``) in turn.
"""

from __future__ import annotations

import math
import pickle
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from processes import DivergedError, InputError, World, first_line, mix
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import epsanet_fused as ef
from epsanet_fused.nn.grouped_conv import ConvPlan

CHECK_EVERY = 20  # steps from one look at the loss to the next: each waits for the device


def progress_bar(world: World, steps: int, title: str) -> tqdm:
    """A bar on stderr, in the first process only; a context manager."""
    return tqdm(
        total=steps, desc=title, file=sys.stderr, disable=not world.is_first, dynamic_ncols=True
    )


class Means:
    """Means of named values over the samples of all steps and processes, summed in float64."""

    def __init__(self, world: World, *names: str) -> None:
        self.world = world
        self.names = names
        self.sums = torch.zeros(1 + len(names), dtype=torch.float64, device=world.device)

    def add(self, count: int, **sums: Tensor) -> None:
        """Each is a scalar, summed over ``count`` samples."""
        row = [sums[name].detach().double() for name in self.names]
        self.sums += torch.stack([torch.full_like(row[0], count), *row])

    def all(self) -> dict[str, float]:
        """The means so far; every process has to ask, and all get the same. NaN without samples."""
        count, *sums = self.world.total(self.sums).tolist()
        return {n: s / count if count else math.nan for n, s in zip(self.names, sums, strict=True)}

    def finite(self, name: str) -> float:
        """One of ``all``.

        Raises:
            DivergedError: if it isn't finite, in every process.
        """
        if not math.isfinite(value := self.all()[name]):
            raise DivergedError(f"the {name} became {value}; a smaller --lr or a warm-up may help")
        return value


def autocast(world: World, amp: bool) -> torch.autocast:
    """Mixed precision if ``amp``: float16 on cuda, bfloat16 elsewhere."""
    dtype = torch.float16 if world.device.type == "cuda" else torch.bfloat16
    return torch.autocast(world.device.type, dtype, enabled=amp)


def merge_groups(model: nn.Module, images: Tensor, world: World, amp: bool, file: Path) -> None:
    """Have the model's convolutions run with groups merged, where that trains faster here.

    Args:
        images: like those of a micro-batch.
        file: holds what was measured; the first process adds what is missing, and all follow it.

    Raises:
        InputError: if the file holds something else.
    """

    def plans() -> dict[str, ConvPlan]:
        try:
            with autocast(world, amp):
                return ef.plan_convs(model, images, training=True, file=file)
        except ValueError as error:
            raise InputError(first_line(error)) from None

    world.say("measuring which groups of the convolutions to merge")
    if world.is_first:
        plans()
    world.gather(None)  # by now it has written them
    found = plans()
    ef.use_plans(model, found)
    convs = dict(model.named_modules())
    merged = sum(plan.groups < convs[name].groups for name, plan in found.items())
    world.say(f"{merged} of {len(found)} convolutions run with fewer groups, see {file}")


class Trainer:
    """A model in training, in step with its copies in the other processes.

    Args:
        model: on ``world.device``.
        optimizer: of the model's parameters; set its learning rate before each step.
        seed: of what the model draws in training, such as a dropout.
        accumulate: micro-batches of a step in this process.
        amp: mixed precision, see ``autocast``; float16 with a scaled loss.
        ema_decay: keeps an exponential moving average of the weights and running statistics, which
            is then what is evaluated; None keeps none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        seed: int = 0,
        accumulate: int = 1,
        amp: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.seed, self.accumulate = seed, accumulate
        self.amp, on_cuda = amp, world.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=amp and on_cuda)
        self.parallel = model
        if world.size > 1:
            # The running statistics are averaged before they are used, not sent around each step.
            self.parallel = DistributedDataParallel(
                model, device_ids=[world.device] if on_cuda else None, broadcast_buffers=False
            )
        self.ema = None
        if ema_decay is not None:
            average = get_ema_multi_avg_fn(ema_decay)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.momenta = [(m, m.momentum) for m in norms if m.momentum is not None]

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate and to keep: the average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def step(
        self,
        key: tuple[int, int],
        batches: Iterable[Any],
        mean_loss: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        """One step of the optimizer.

        Args:
            key: (epoch, step in the epoch). What the model draws depends on this, the seed and the
                micro-batch's place among those of all processes.
            batches: ``accumulate`` micro-batches.
            mean_loss: maps the model to call and a micro-batch to the mean loss of its samples.
        """
        self.optimizer.zero_grad()
        for k, batch in enumerate(batches):
            torch.manual_seed(mix(self.seed, *key, self.world.rank * self.accumulate + k))
            self._share_momentum(k)
            is_last = k == self.accumulate - 1
            waits = not is_last and isinstance(self.parallel, DistributedDataParallel)
            with self.parallel.no_sync() if waits else nullcontext():
                with autocast(self.world, self.amp):
                    loss = mean_loss(self.parallel, batch)
                self.scaler.scale(loss / self.accumulate).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def epoch(
        self,
        epoch: int,
        epochs: int,
        loader: DataLoader[Any],
        rate: Callable[[int, int], float],
        mean_loss: Callable[[nn.Module, Any], Tensor],
        means: Means,
    ) -> float:
        """All steps of an epoch, counted from 0, of ``epochs``.

        Args:
            loader: of ``TrainingBatches``.
            rate: maps a step and their number to the learning rate.
            mean_loss: see ``step``.
            means: what ``mean_loss`` adds to, the "loss" among it.

        Returns:
            The images per second, in all processes.

        Raises:
            DivergedError: if the loss isn't finite any more.
        """
        start = time.perf_counter()
        batches, steps = loader.batch_sampler, len(loader) // self.accumulate
        self.model.train()
        batches.epoch = epoch
        dealt = iter(loader)
        with progress_bar(self.world, steps, f"epoch {epoch + 1}/{epochs}") as bar:
            for step in range(steps):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate(step, steps)
                self.step((epoch, step), islice(dealt, self.accumulate), mean_loss)
                bar.update()
                if step % CHECK_EVERY == 0 or step == steps - 1:
                    bar.set_postfix(loss=f"{means.finite('loss'):.4f}")
        self.average_statistics()
        return round(steps * batches.batch / (time.perf_counter() - start), 1)

    def _share_momentum(self, k: int) -> None:
        """Have the running statistics take all micro-batches of a step with one weight.

        Updates follow one another, so an early one is diluted by those after it: with
        w = momentum / accumulate, the k-th gets w / (1 - w * (accumulate - 1 - k)), which leaves
        each with w in the end, and what was there before with 1 - momentum.
        """
        if self.accumulate == 1:
            return
        for norm, momentum in self.momenta:
            w = momentum / self.accumulate
            norm.momentum = w / (1 - w * (self.accumulate - 1 - k))

    def average_statistics(self) -> None:
        """Give all processes the mean of their running statistics; do it after every epoch.

        The statistics are linear in what the steps add to them, so this is as good as averaging
        after every step.
        """
        if self.world.size == 1:
            return
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        for module in (m for model in models for m in model.modules()):
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                for statistic in (module.running_mean, module.running_var):
                    statistic.copy_(self.world.total(statistic) / self.world.size)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: ``state_dict`` is what was evaluated, the rest is to go on with."""
        state = {
            "state_dict": self.evaluated.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.ema is not None:
            state["raw_state_dict"] = self.model.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def resume(self, path: Path) -> tuple[dict[str, Any], list[str]]:
        """Load a checkpoint of the recipes or of the official script.

        The optimizer's settings (lr, momentum, ...) stay as they are: the command line has them.

        Returns:
            What else the file holds, and a line for all that it lacks or that isn't used.

        Raises:
            InputError: if the file can't be read or doesn't fit.
        """
        rest = load_weights(self.model, path, "--resume")
        notes = [*self._resume_average(rest), *self._resume_optimizer(rest, path)]
        if self.scaler.is_enabled():
            if scaler := rest.pop("scaler", None):
                self.scaler.load_state_dict(scaler)
            else:
                notes.append("it has no scale for the loss, which starts anew")
        return rest, notes

    def _resume_average(self, rest: dict[str, Any]) -> list[str]:
        raw = rest.pop("raw_state_dict", None)
        if self.ema is not None:
            self.ema.module.load_state_dict(self.model.state_dict())
            self.ema.n_averaged.fill_(1)  # the next update averages; the very first would copy
        if raw is not None:
            self.model.load_state_dict(raw)
        if self.ema is not None and raw is None:
            return ["it has no average of the weights (--ema), which starts from its weights"]
        if self.ema is None and raw is not None:
            return ["its average of the weights is dropped, as --ema isn't given"]
        return []

    def _resume_optimizer(self, rest: dict[str, Any], path: Path) -> list[str]:
        if (state := rest.pop("optimizer", None)) is None:
            return ["it has no state of the optimizer, whose momentum starts at zero"]
        settings = [dict(group) for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state)
            _check_shapes(self.optimizer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"--resume {path}: its optimizer doesn't fit the model: {error}"
            ) from None
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update({k: v for k, v in setting.items() if k != "params"})
        return []


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """load_state_dict takes a momentum of any shape for any parameter."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"{name} is {tuple(value.shape)} where the parameter is "
                    f"{tuple(parameter.shape)}"
                )


def load_weights(model: nn.Module, path: Path, option: str) -> dict[str, Any]:
    """``ef.load_checkpoint``, with an InputError that names the option for whatever goes wrong."""
    try:
        return ef.load_checkpoint(model, path)
    except pickle.UnpicklingError:  # torch's own advice is to run what is in there
        raise InputError(
            f"{option} {path} is torn, or holds more than tensors and plain values"
        ) from None
    except Exception as error:  # a torn file raises errors of many types
        raise InputError(f"{option} {path}: {first_line(error)}") from None
