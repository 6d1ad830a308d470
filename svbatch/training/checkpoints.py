"""The optimisation loop that all stages share, and its checkpoints.

A stage killed at any moment goes on from its last checkpoint onto the same loss curve: a step's batch and its random
numbers follow from the seed and the step alone.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from tqdm import tqdm

from svbatch.errors import TrainingError

log = logging.getLogger(__name__)
SAVE_EVERY_SECONDS = 120.0


class Schedule(BaseModel):
    """How long and how fast a stage learns; `learning_rate` is the peak, by the name of what is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    learning_rate: dict[str, float]
    warmup_steps: int = 200
    final_share: float = 0.02
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def share(self, step: int) -> float:
        """Learning rate at `step` as a share of its peak: linear warm-up, then a cosine to `final_share`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimise(
    name: str,
    modules: Mapping[str, nn.Module],
    schedule: Schedule,
    losses: Callable[[int], dict[str, Tensor]],
    folder: Path,
    *,
    seed: int,
) -> None:
    """Train what is trainable in `modules` for the schedule's steps; `losses(step)` gives named losses to add up.

    `folder` receives NAME.pt (the last checkpoint) and a line per 10 steps in metrics.jsonl. Goes on from NAME.pt if
    there is one. Raises TrainingError at a loss or gradient that is not finite, naming the step.
    """
    learning = {key: [p for p in modules[key].parameters() if p.requires_grad] for key in schedule.learning_rate}
    groups = [{"params": parameters, "peak": schedule.learning_rate[key]} for key, parameters in learning.items()]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    checkpoint = folder / f"{name}.pt"
    first = _resume(checkpoint, modules, optimiser)
    saved_at = time.monotonic()
    for module in modules.values():
        module.train()
    steps = tqdm(range(first, schedule.steps), desc=name, initial=first, total=schedule.steps, disable=None)
    for step in steps:
        torch.manual_seed(seed * 1_000_003 + step)
        parts = losses(step)
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_([p for group in learning.values() for p in group], schedule.clip_norm)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"stage {name}, step {step}: gradient norm {float(norm)}; lower its learning rate, or look at batch "
                f"{step} of seed {seed}"
            )
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * schedule.share(step)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 10 == 9:
            line = {"stage": name, "step": step + 1, **{k: round(v.item(), 4) for k, v in parts.items()}}
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"gradient_norm": round(float(norm), 4)}) + "\n")
        if time.monotonic() - saved_at > SAVE_EVERY_SECONDS or step + 1 == schedule.steps:
            _save(checkpoint, modules, optimiser, step + 1)
            saved_at = time.monotonic()
    for module in modules.values():
        module.eval()


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that learn, by name; frozen ones are not repeated in every checkpoint."""
    return {key: value.detach() for key, value in module.named_parameters() if value.requires_grad}


def _save(path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, step: int) -> None:
    states = {key: trainable_state(module) for key, module in modules.items()}
    part = path.with_suffix(".part")
    torch.save({"step": step, "modules": states, "optimiser": optimiser.state_dict()}, part)
    part.rename(path)


def _resume(path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(saved["modules"][key], strict=False)
    optimiser.load_state_dict(saved["optimiser"])
    log.info("%s: goes on at step %d", path.name, saved["step"])
    return int(saved["step"])
