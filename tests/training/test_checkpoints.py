import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svbatch.errors import TrainingError
from svbatch.training.checkpoints import Schedule, Stopping, Validation, optimise, trainable_state

# A module small enough to learn in a moment; its losses draw random numbers, as masking and dropout do.
LEARN = """
import os, signal, sys
from pathlib import Path
import torch
from svbatch.training import checkpoints

def learn(folder, *, die_at=None):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    schedule = checkpoints.Schedule(steps=60, learning_rate={"line": 0.05}, warmup_steps=5)

    def losses(step):
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(8, 3)
        miss = module(x) - x.sum(1, keepdim=True)
        return {"square": miss.square().mean(), "size": 0.01 * module.weight.square().sum()}

    checkpoints.optimise("stage", {"line": module}, schedule, losses, Path(folder), seed=3)
    return module
"""
DIE = "checkpoints.SAVE_EVERY_SECONDS = 0.0\nlearn(sys.argv[1], die_at=37)\n"


def learn(folder: Path) -> torch.nn.Linear:
    names: dict = {}
    exec(LEARN, names)
    folder.mkdir(exist_ok=True)
    return names["learn"](folder)


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_killed_by_kill_9_goes_on_onto_the_same_loss_curve(tmp_path):
    straight = learn(tmp_path / "straight")
    (tmp_path / "killed").mkdir()
    died = subprocess.run([sys.executable, "-c", LEARN + DIE, tmp_path / "killed"], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert [line["step"] for line in curve(tmp_path / "killed")] == [10, 20, 30]
    resumed = learn(tmp_path / "killed")
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")
    assert [line["step"] for line in curve(tmp_path / "straight")] == [10, 20, 30, 40, 50, 60]
    assert torch.equal(resumed.weight, straight.weight)


def test_what_a_killed_run_measured_after_its_last_checkpoint_is_not_written_twice(tmp_path):
    learn(tmp_path / "straight")
    (tmp_path / "killed").mkdir()
    late = LEARN + "learn(sys.argv[1], die_at=37)\n"  # its only checkpoint would be two minutes away
    died = subprocess.run([sys.executable, "-c", late, tmp_path / "killed"], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert [line["step"] for line in curve(tmp_path / "killed")] == [10, 20, 30]
    learn(tmp_path / "killed")
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")


def test_a_finished_stage_is_not_trained_again(tmp_path):
    done = learn(tmp_path / "stage")
    lines = curve(tmp_path / "stage")
    assert torch.equal(learn(tmp_path / "stage").weight, done.weight)
    assert curve(tmp_path / "stage") == lines
    assert lines[-1]["square"] < lines[0]["square"] / 2


def test_a_loss_that_is_not_finite_stops_the_stage_and_names_the_step(tmp_path):
    module = torch.nn.Linear(2, 1)
    schedule = Schedule(steps=5, learning_rate={"line": 0.1})

    def losses(step: int) -> dict[str, torch.Tensor]:
        return {"bad": module(torch.full((1, 2), float("nan") if step == 3 else 1.0)).sum()}

    with pytest.raises(TrainingError, match=r"stage bad, step 3: gradient norm nan; lower its learning rate"):
        optimise("bad", {"line": module}, schedule, losses, tmp_path, seed=0)


def test_what_is_frozen_is_not_in_a_checkpoint():
    module = torch.nn.Linear(2, 1)
    module.weight.requires_grad_(False)
    assert list(trainable_state(module)) == ["bias"]


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_final_share():
    schedule = Schedule(steps=100, learning_rate={}, warmup_steps=10, final_share=0.1)
    shares = [schedule.share(step) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == pytest.approx(1.0)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[100] == pytest.approx(0.1)


def line(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(2, 1)


def test_a_step_of_several_batches_learns_from_their_mean(tmp_path):
    inputs = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(0))
    weights = []
    for name, size in (("alone", 1), ("several", 4)):
        module = line()

        def losses(batch: int, module=module, size=size) -> dict[str, torch.Tensor]:
            x = inputs[batch % 4][None] if size == 4 else inputs
            return {"square": (module(x) - x.sum(-1, keepdim=True)).square().mean()}

        schedule = Schedule(steps=5, learning_rate={"line": 0.1}, warmup_steps=1)
        optimise(name, {"line": module}, schedule, losses, tmp_path, seed=0, micro_batches=size)
        weights.append(module.weight.detach())
    torch.testing.assert_close(*weights)


def test_a_stage_ends_when_validation_gets_no_better_and_keeps_the_best(tmp_path):
    module = line()
    seen: list[torch.Tensor] = []

    def judge(batch: int) -> dict[str, torch.Tensor]:
        seen.append(module.weight.detach().clone())
        return {"loss": torch.tensor([3.0, 2.0, 2.5, 2.1, 9.0][len(seen) - 1])}

    optimise(
        "stage",
        {"line": module},
        Schedule(steps=100, learning_rate={"line": 0.1}, warmup_steps=1),
        lambda batch: {"size": module.weight.square().sum()},
        tmp_path,
        seed=0,
        validation=Validation(judge, 1, Stopping(every=10, patience=2)),
    )
    assert len(seen) == 4
    assert torch.equal(module.weight, seen[1])
    assert [x["validation"] for x in curve(tmp_path) if "validation" in x] == [3.0, 2.0, 2.5, 2.1]
    assert (tmp_path / "stage-best.pt").exists()


def test_an_exploding_gradient_stops_training_with_the_batch_named(tmp_path):
    module = line()
    schedule = Schedule(steps=9, learning_rate={"line": 0.1}, max_norm=100.0)

    def losses(batch: int) -> dict[str, torch.Tensor]:
        return {"sum": module(torch.ones(1, 2)).sum() * (1e6 if batch == 5 else 1.0)}

    with pytest.raises(TrainingError, match=r"step 2: gradient norm \S+, above max_norm 100; .* look at .*b5\.wav"):
        optimise(
            "stage",
            {"line": module},
            schedule,
            losses,
            tmp_path,
            seed=0,
            micro_batches=2,
            describe=lambda b: f"b{b}.wav",
        )


def test_metrics_are_for_tensorboard_too(tmp_path):
    learn(tmp_path / "stage")
    assert list((tmp_path / "stage" / "tensorboard").glob("events.*"))
