"""The optimisation loop that all stages share, and its checkpoints.

A stage killed at any moment goes on from its last checkpoint onto the same loss curve: a batch and its random numbers
follow from the seed and the batch's number alone. A step is so many batches, shared out among the processes that
accelerate started; each holds all parts, and the gradients of what learns are averaged after every step, so the curve
does not depend on the number of processes but for the order of sums.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, reduce
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from svbatch.errors import TrainingError
from svbatch.training.progress import with_progress

log = logging.getLogger(__name__)
SAVE_EVERY_SECONDS = 120.0
MEASURE_EVERY = 10  # steps
METRICS = "metrics.jsonl"
Losses = Callable[[int], dict[str, Tensor]]


class Schedule(BaseModel):
    """How long and how fast a stage learns; `learning_rate` is the peak, by the name of what is trained. A gradient
    longer than `clip_norm` is cut to it; one longer than `max_norm` stops training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: PositiveInt
    learning_rate: dict[str, NonNegativeFloat]
    warmup_steps: int = 200
    final_share: float = 0.02
    weight_decay: float = 0.01
    clip_norm: PositiveFloat = 1.0
    max_norm: PositiveFloat | None = None

    def share(self, step: int) -> float:
        """Learning rate at `step` as a share of its peak: linear warm-up, then a cosine to `final_share`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Stopping(BaseModel):
    """A stage ends before its last step when `patience` validations running, one each `every` steps, were no better
    than the best; what the best had learnt is then taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: PositiveInt
    patience: PositiveInt


@dataclass(frozen=True)
class Validation:
    """Losses on held-out batches, numbered from 0 to `num_batches` - 1, and when they end a stage."""

    losses: Losses
    num_batches: int
    stopping: Stopping


@dataclass
class _Progress:
    """How far a stage has come: the next step, and its best validation with how many came after."""

    step: int = 0
    best_loss: float = math.inf
    num_worse: int = 0

    def is_best(self, loss: float) -> bool:
        """Notes one more validation; whether none before was as good."""
        if loss < self.best_loss:
            self.best_loss, self.num_worse = loss, 0
            return True
        self.num_worse += 1
        return False


def optimise(
    name: str,
    modules: Mapping[str, nn.Module],
    schedule: Schedule,
    losses: Losses,
    folder: Path,
    *,
    seed: int,
    micro_batches: int = 1,
    validation: Validation | None = None,
    describe: Callable[[int], str] = lambda batch: f"batch {batch}",
) -> None:
    """Train what is trainable in `modules` for the schedule's steps; `losses(batch)` gives named losses to add up, the
    mean over `micro_batches` of them makes a step.

    `folder` receives NAME.pt (the last checkpoint), NAME-best.pt (that of the best validation), a line per 10 steps in
    metrics.jsonl, and the same for TensorBoard where it is installed. Goes on from NAME.pt if there is one. Raises
    TrainingError at a gradient that is not finite or longer than the schedule allows, naming the batch by `describe`.
    """
    accelerator = Accelerator()
    optimiser = _optimiser(modules, schedule)
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    own = _own_batches(micro_batches, accelerator)
    checkpoint, best = folder / f"{name}.pt", folder / f"{name}-best.pt"
    progress = _resume(checkpoint, modules, optimiser)
    saved_at = time.monotonic()
    with _training(modules), _metrics(folder, name, progress.step, accelerator) as write:
        for step in with_progress(range(progress.step, schedule.steps), name, done=progress.step):
            if validation and progress.num_worse >= validation.stopping.patience:
                break
            batches = [step * micro_batches + i for i in own]
            parts = _backward(batches, losses, seed, micro_batches)
            norm = _clipped(trained, schedule, accelerator)
            _refuse_odd(norm, schedule, name, step, batches, describe, accelerator)
            _learn(optimiser, schedule.share(step))
            progress.step = step + 1
            if progress.step % MEASURE_EVERY == 0:
                write(progress.step, {**_averaged(parts, accelerator), "gradient_norm": float(norm)})
            if validation and progress.step % validation.stopping.every == 0:
                loss = _validate(modules, validation, accelerator)
                write(progress.step, {"validation": loss})
                if progress.is_best(loss):
                    _save(best, modules, optimiser, progress, accelerator)
                _save(checkpoint, modules, optimiser, progress, accelerator)
            is_due = _agreed(time.monotonic() - saved_at > SAVE_EVERY_SECONDS, accelerator)
            if is_due or progress.step == schedule.steps:
                _save(checkpoint, modules, optimiser, progress, accelerator)
                saved_at = time.monotonic()
    if validation and best.exists():
        _resume(best, modules, optimiser)


@contextmanager
def _training(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    for module in modules.values():
        module.train()
    try:
        yield
    finally:
        for module in modules.values():
            module.eval()


def _optimiser(modules: Mapping[str, nn.Module], schedule: Schedule) -> torch.optim.Optimizer:
    """Of what is trainable, each module a group with the peak of its learning rate."""
    learning = {key: [p for p in modules[key].parameters() if p.requires_grad] for key in schedule.learning_rate}
    groups = [{"params": parameters, "peak": schedule.learning_rate[key]} for key, parameters in learning.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)


def _learn(optimiser: torch.optim.Optimizer, share: float) -> None:
    """One step at a share of the peak learning rates."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def _own_batches(micro_batches: int, accelerator: Accelerator) -> range:
    """Which of a step's batches are this process's."""
    if micro_batches % accelerator.num_processes:
        raise TrainingError(
            f"micro_batches {micro_batches} cannot be shared out among {accelerator.num_processes} processes; "
            "choose a multiple"
        )
    return range(accelerator.process_index, micro_batches, accelerator.num_processes)


def _backward(batches: Sequence[int], losses: Losses, seed: int, micro_batches: int) -> list[dict[str, Tensor]]:
    """Gradients of the mean over a step's batches, as far as they are this process's; the losses themselves."""
    found = []
    for batch in batches:
        torch.manual_seed(seed * 1_000_003 + batch)
        parts = losses(batch)
        (torch.stack(list(parts.values())).sum() / micro_batches).backward()  # type: ignore[no-untyped-call]
        found.append({key: value.detach() for key, value in parts.items()})
    return found


def _clipped(trained: Sequence[nn.Parameter], schedule: Schedule, accelerator: Accelerator) -> Tensor:
    """Sums the gradients over all processes, cuts them to the schedule's norm and returns the norm before."""
    if accelerator.num_processes > 1:
        for parameter in trained:
            if parameter.grad is None:  # nothing of this process's batches reached it
                parameter.grad = torch.zeros_like(parameter)
        flat = reduce(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]), reduction="sum")
        for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            parameter.grad = part.view_as(parameter)
    return torch.nn.utils.clip_grad_norm_(trained, schedule.clip_norm)


def _refuse_odd(
    norm: Tensor,
    schedule: Schedule,
    name: str,
    step: int,
    batches: Sequence[int],
    describe: Callable[[int], str],
    accelerator: Accelerator,
) -> None:
    if torch.isfinite(norm) and (schedule.max_norm is None or norm <= schedule.max_norm):
        return
    limit = "" if schedule.max_norm is None or not torch.isfinite(norm) else f", above max_norm {schedule.max_norm:g}"
    held = "; ".join(describe(batch) for batch in batches)
    where = f" on process {accelerator.process_index}" if accelerator.num_processes > 1 else ""
    raise TrainingError(
        f"stage {name}, step {step}: gradient norm {float(norm):g}{limit}; lower its learning rate, or look at {held}"
        f"{where}"
    )


def _averaged(parts: Sequence[Mapping[str, Tensor]], accelerator: Accelerator) -> dict[str, float]:
    """Mean of each loss over the batches of a step that have it; with several processes, over the first's."""
    names = dict.fromkeys(key for each in parts for key in each)
    return {key: _mean([float(each[key]) for each in parts if key in each]) for key in names}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def _validate(modules: Mapping[str, nn.Module], validation: Validation, accelerator: Accelerator) -> float:
    """Mean of the summed losses over the held-out batches; the modules are as in training before and after."""
    for module in modules.values():
        module.eval()
    own = range(accelerator.process_index, validation.num_batches, accelerator.num_processes)
    total = torch.zeros(1, device=accelerator.device)
    for batch in own:
        torch.manual_seed(batch)
        total += sum(float(value) for value in validation.losses(batch).values())
    for module in modules.values():
        module.train()
    return float(reduce(total, reduction="sum")) / validation.num_batches


def _agreed(wish: bool, accelerator: Accelerator) -> bool:
    """The first process's wish, in all of them."""
    if accelerator.num_processes == 1:
        return wish
    return bool(broadcast(torch.tensor([int(wish)], device=accelerator.device))[0])


@contextmanager
def _metrics(
    folder: Path, stage: str, start: int, accelerator: Accelerator
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Writes figures of a step after `start` as a line of metrics.jsonl and for TensorBoard; only the first process
    writes."""
    board = _board(folder / "tensorboard", start) if accelerator.is_main_process else None
    if accelerator.is_main_process:
        _forget_lines(folder / METRICS, stage, start)

    def write(step: int, figures: Mapping[str, float]) -> None:
        if not accelerator.is_main_process:
            return
        line = {"stage": stage, "step": step, **{key: round(value, 4) for key, value in figures.items()}}
        with (folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for key, value in figures.items():
            if board is not None:
                board.add_scalar(f"{stage}/{key}", value, step)

    with board or nullcontext():
        yield write


def _forget_lines(path: Path, stage: str, step: int) -> None:
    """Drops what a killed run wrote of steps that its last checkpoint does not know, and a line that was cut."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    places = [(line, json.loads(line)) for line in lines]
    kept = "".join(line for line, said in places if said["stage"] != stage or said["step"] <= step)
    part = path.with_suffix(".part")
    part.write_text(kept, encoding="utf-8")
    part.rename(path)


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, after `step`; None where `svbatch[train]` is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that learn, by name; frozen ones are not repeated in every checkpoint."""
    return {key: value.detach() for key, value in module.named_parameters() if value.requires_grad}


def _save(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    progress: _Progress,
    accelerator: Accelerator,
) -> None:
    if accelerator.is_main_process:
        states = {key: trainable_state(module) for key, module in modules.items()}
        part = path.with_suffix(".part")
        torch.save({**vars(progress), "modules": states, "optimiser": optimiser.state_dict()}, part)
        part.rename(path)
    accelerator.wait_for_everyone()


def _resume(path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> _Progress:
    if not path.exists():
        return _Progress()
    saved = torch.load(path, weights_only=True, map_location="cpu")
    for key, module in modules.items():
        module.load_state_dict(saved["modules"][key], strict=False)
    optimiser.load_state_dict(saved["optimiser"])
    log.info("%s: step %d", path.name, saved["step"])
    return _Progress(saved["step"], saved.get("best_loss", math.inf), saved.get("num_worse", 0))
