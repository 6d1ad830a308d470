"""Training the tiny paper model is killed and goes on; two processes learn as one."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svbatch.training import checkpoints
from svbatch.training.parts import frozen_parts
from svbatch.training.recipe import load_recipe
from svbatch.training.stages import train

TRAIN = """
import os, signal, sys
from pathlib import Path
from svbatch.training import checkpoints
from svbatch.training.parts import frozen_parts
from svbatch.training.recipe import load_recipe
from svbatch.training.stages import train

recipe, data, parts, cache, output = map(Path, sys.argv[1:6])
checkpoints.MEASURE_EVERY = 1
"""
DIE = """
checkpoints.SAVE_EVERY_SECONDS = 0.0
save = checkpoints._save

def save_and_die(path, modules, optimiser, progress, accelerator):
    save(path, modules, optimiser, progress, accelerator)
    if path.name == "tasks.pt" and progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints._save = save_and_die
"""
GO = """
loaded = load_recipe(recipe)
train(loaded, frozen_parts(loaded, recipe.parent, parts, cache), data, output)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, spoken, paper_recipe, exporting):
    """The tiny WavLM recipe with its parts made, its frames cached, and a straight run."""
    folder = tmp_path_factory.mktemp("faults")
    recipe = paper_recipe(folder, "wavlm")
    loaded = load_recipe(recipe)
    with exporting():
        bundle = frozen_parts(loaded, folder, folder / "parts", folder / "cache")
    patch = pytest.MonkeyPatch()
    patch.setattr(checkpoints, "MEASURE_EVERY", 1)
    parts = train(loaded, bundle, spoken, folder / "straight")
    patch.undo()
    return folder, recipe, bundle, parts


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_killed_by_kill_9_goes_on_onto_the_same_loss_curve_bit_by_bit(base, spoken, monkeypatch):
    folder, recipe, bundle, straight = base
    arguments = [recipe, spoken, folder / "parts", folder / "cache", folder / "killed"]
    died = subprocess.run([sys.executable, "-c", TRAIN + DIE + GO, *arguments], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    assert len(curve(folder / "killed")) == 15
    monkeypatch.setattr(checkpoints, "MEASURE_EVERY", 1)
    resumed = train(load_recipe(recipe), bundle, spoken, folder / "killed")
    assert curve(folder / "killed") == curve(folder / "straight")
    assert len(curve(folder / "straight")) == 20
    for module in ("projector", "llm"):
        own, other = (checkpoints.trainable_state(getattr(parts, module)) for parts in (resumed, straight))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


def test_only_what_a_stage_names_learns(base):
    folder, _, _, parts = base
    first = torch.load(folder / "straight" / "asr_projector.pt", weights_only=True)
    assert first["modules"].keys() == {"projector"}
    assert any(bool(w.any()) for name, w in checkpoints.trainable_state(parts.llm).items() if "lora_B" in name)


@pytest.mark.slow
def test_two_processes_learn_as_one(base, spoken):
    folder, recipe, _, _ = base
    (folder / "two.py").write_text(TRAIN + GO)
    arguments = [recipe, spoken, folder / "parts", folder / "cache", folder / "two"]
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    subprocess.run([*launch, folder / "two.py", *arguments], check=True, capture_output=True, timeout=500)
    for own, other in zip(curve(folder / "two"), curve(folder / "straight"), strict=True):
        assert own["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2)
