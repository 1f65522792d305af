"""The training loop of the recipes: steps, running averages, mixed precision and resuming.

A step has ``size * accumulate`` micro-batches of equal size, over ``size`` processes. Its loss, its
gradient and its update of BatchNorm's running statistics are the means over the micro-batches. Each
micro-batch is normalised by itself. So N processes and one process with N times the micro-batches
(``accumulate``) give the same numbers, up to rounding.
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
from distributed import DivergedError, InputError, World, derive_seed, first_line
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import epsanet_fused as ef
from epsanet_fused.nn.grouped_conv import ConvPlan

CHECK_EVERY = 20  # steps between two checks of the loss; each check synchronises with the device


def progress_bar(world: World, steps: int, title: str) -> tqdm:
    """Return a progress bar, a context manager, on stderr of the first process only."""
    return tqdm(
        total=steps, desc=title, file=sys.stderr, disable=not world.is_first, dynamic_ncols=True
    )


class AverageMeter:
    """Means of named values over the samples of all steps and processes, summed in float64."""

    def __init__(self, world: World, *names: str) -> None:
        self.world = world
        self.names = names
        self.sums = torch.zeros(1 + len(names), dtype=torch.float64, device=world.device)

    def update(self, count: int, **sums: Tensor) -> None:
        """Add values of ``count`` samples: for each name a scalar, summed over the samples."""
        row = [sums[name].detach().double() for name in self.names]
        self.sums += torch.stack([torch.full_like(row[0], count), *row])

    def compute(self) -> dict[str, float]:
        """Return the means so far, NaN without samples.

        Every process must call this, and each gets the means over all processes.
        """
        count, *sums = self.world.all_reduce_sum(self.sums).tolist()
        return {n: s / count if count else math.nan for n, s in zip(self.names, sums, strict=True)}

    def compute_finite(self, name: str) -> float:
        """Return one of the means of ``compute``.

        Raises:
            DivergedError: if it isn't finite, in every process.
        """
        if not math.isfinite(value := self.compute()[name]):
            raise DivergedError(f"the {name} became {value}; a smaller --lr or a warm-up may help")
        return value


def autocast(world: World, amp: bool) -> torch.autocast:
    """Return the context of mixed precision if ``amp``: float16 on cuda, bfloat16 elsewhere."""
    dtype = torch.float16 if world.device.type == "cuda" else torch.bfloat16
    return torch.autocast(world.device.type, dtype, enabled=amp)


def merge_groups(model: nn.Module, images: Tensor, world: World, amp: bool, file: Path) -> None:
    """Make the model's convolutions run with merged groups where that trains faster.

    Args:
        images: a batch with the shape and memory format of a micro-batch.
        file: keeps the measured plans. The first process measures what is missing in it; all
            processes use the plans in it.

    Raises:
        InputError: if the file has other content.
    """

    def plans() -> dict[str, ConvPlan]:
        try:
            with autocast(world, amp):
                return ef.plan_convs(model, images, training=True, file=file)
        except ValueError as error:
            raise InputError(first_line(error)) from None

    world.print("measuring which groups of the convolutions to merge")
    if world.is_first:
        plans()
    world.all_gather(None)  # wait until the first process has written the file
    found = plans()
    ef.use_plans(model, found)
    convs = dict(model.named_modules())
    merged = sum(plan.groups < convs[name].groups for name, plan in found.items())
    world.print(f"{merged} of {len(found)} convolutions run with fewer groups, see {file}")


class Trainer:
    """Trains a model in step with its copies in the other processes.

    Args:
        model: on ``world.device``.
        optimizer: of the model's parameters. Set its learning rate before each step.
        seed: for random draws of the model in training, such as dropout.
        accumulate: micro-batches of a step in this process.
        amp: use mixed precision, see ``autocast``; with float16 the loss is scaled.
        ema_decay: decay of an exponential moving average of the weights and running statistics,
            which is then evaluated instead of the model; None keeps no average.
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
            # average_running_stats replaces the broadcast of the buffers in each step.
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
    def eval_model(self) -> nn.Module:
        """The model to evaluate and to save: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def step(
        self,
        key: tuple[int, int],
        batches: Iterable[Any],
        mean_loss: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        """Run one step of the optimizer.

        Args:
            key: (epoch, step of the epoch). With the seed and the micro-batch's index among those
                of all processes it determines the random draws of the model.
            batches: ``accumulate`` micro-batches.
            mean_loss: maps the model to call and a micro-batch to the mean loss of its samples.
        """
        self.optimizer.zero_grad()
        for k, batch in enumerate(batches):
            torch.manual_seed(derive_seed(self.seed, *key, self.world.rank * self.accumulate + k))
            self._set_norm_momentum(k)
            is_last = k == self.accumulate - 1
            skip_sync = not is_last and isinstance(self.parallel, DistributedDataParallel)
            with self.parallel.no_sync() if skip_sync else nullcontext():
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
        learning_rate: Callable[[int, int], float],
        mean_loss: Callable[[nn.Module, Any], Tensor],
        meter: AverageMeter,
    ) -> float:
        """Run all steps of an epoch.

        Args:
            epoch: counted from 0.
            epochs: the number of epochs, for the progress bar.
            loader: has a ``TrainingBatchSampler``.
            learning_rate: maps (step, steps of the epoch) to the learning rate of the step.
            mean_loss: see ``step``.
            meter: updated by ``mean_loss``; one of its names is "loss".

        Returns:
            The images per second, over all processes.

        Raises:
            DivergedError: if the loss is no longer finite.
        """
        start = time.perf_counter()
        sampler, steps = loader.batch_sampler, len(loader) // self.accumulate
        self.model.train()
        sampler.epoch = epoch
        batches = iter(loader)
        with progress_bar(self.world, steps, f"epoch {epoch + 1}/{epochs}") as bar:
            for step in range(steps):
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps)
                self.step((epoch, step), islice(batches, self.accumulate), mean_loss)
                bar.update()
                if step % CHECK_EVERY == 0 or step == steps - 1:
                    bar.set_postfix(loss=f"{meter.compute_finite('loss'):.4f}")
        self.average_running_stats()
        return round(steps * sampler.batch_size / (time.perf_counter() - start), 1)

    def _set_norm_momentum(self, k: int) -> None:
        """Set the norms' momentum so that all micro-batches of a step get the same weight.

        Each update of the running statistics also scales down the earlier ones. With
        w = momentum / accumulate, the k-th micro-batch uses w / (1 - w * (accumulate - 1 - k)):
        after the step each micro-batch has the weight w, and the old statistics 1 - momentum.
        """
        if self.accumulate == 1:
            return
        for norm, momentum in self.momenta:
            w = momentum / self.accumulate
            norm.momentum = w / (1 - w * (self.accumulate - 1 - k))

    def average_running_stats(self) -> None:
        """Average the running statistics over the processes; call this after every epoch.

        The statistics are linear in the updates of the steps, so the result is the same as with an
        average after every step.
        """
        if self.world.size == 1:
            return
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        for module in (m for model in models for m in model.modules()):
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                for statistic in (module.running_mean, module.running_var):
                    statistic.copy_(self.world.all_reduce_sum(statistic) / self.world.size)

    def state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint.

        ``state_dict`` is that of ``eval_model``; ``raw_state_dict`` (with a moving average),
        ``optimizer`` and ``scaler`` (if the loss is scaled) are only for resuming.
        """
        state = {
            "state_dict": self.eval_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.ema is not None:
            state["raw_state_dict"] = self.model.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def resume(self, path: Path) -> tuple[dict[str, Any], list[str]]:
        """Load a checkpoint of the recipes or of the official script.

        The optimizer's settings (lr, momentum, ...) aren't loaded: the command line sets them.

        Returns:
            The other entries of the checkpoint, and one line for each entry that is missing or
            unused.

        Raises:
            InputError: if the file can't be read or doesn't fit.
        """
        entries = load_weights(self.model, path, "--resume")
        notes = [*self._resume_average(entries), *self._resume_optimizer(entries, path)]
        if self.scaler.is_enabled():
            if scaler := entries.pop("scaler", None):
                self.scaler.load_state_dict(scaler)
            else:
                notes.append("it has no scale of the loss, which starts at the default")
        return entries, notes

    def _resume_average(self, entries: dict[str, Any]) -> list[str]:
        raw = entries.pop("raw_state_dict", None)
        if self.ema is not None:
            self.ema.module.load_state_dict(self.model.state_dict())
            self.ema.n_averaged.fill_(1)  # at 0 the next update would copy the weights
        if raw is not None:
            self.model.load_state_dict(raw)
        if self.ema is not None and raw is None:
            return ["it has no average of the weights (--ema), which starts from its weights"]
        if self.ema is None and raw is not None:
            return ["its average of the weights is dropped, because --ema isn't given"]
        return []

    def _resume_optimizer(self, entries: dict[str, Any], path: Path) -> list[str]:
        if (state := entries.pop("optimizer", None)) is None:
            return ["it has no state of the optimizer, whose momentum starts at zero"]
        settings = [dict(group) for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state)
            _check_state_shapes(self.optimizer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"--resume {path}: its optimizer doesn't fit the model: {error}"
            ) from None
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update({k: v for k, v in setting.items() if k != "params"})
        return []


def _check_state_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Check that momenta have the shapes of their parameters: load_state_dict doesn't."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"{name} is {tuple(value.shape)} where the parameter is "
                    f"{tuple(parameter.shape)}"
                )


def load_weights(model: nn.Module, path: Path, option: str) -> dict[str, Any]:
    """Call ``ef.load_checkpoint`` and turn its errors into an InputError that names the option."""
    try:
        return ef.load_checkpoint(model, path)
    except pickle.UnpicklingError:  # torch's message advises to load with weights_only=False
        raise InputError(
            f"{option} {path} is torn, or holds more than tensors and plain values"
        ) from None
    except Exception as error:  # a damaged file raises errors of many types
        raise InputError(f"{option} {path}: {first_line(error)}") from None
