import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from svbatch.cli import main
from svbatch.errors import TrainingError
from svbatch.speech.tone import ToneHead
from svbatch.training.data import Example
from svbatch.training.frames import Clip, Listener
from svbatch.training.recipe import ToneStage, load_recipe
from svbatch.training.shape import tone_labels
from svbatch.training.tone import ToneTeacher

WIDTH = 6
LABELS = {"gender": ["female", "male"]}
STAGE = ToneStage.model_validate(
    {"name": "tone", "hearings_per_batch": 16, "schedule": {"steps": 1, "learning_rate": {}}}
)


@pytest.fixture(scope="module")
def voices(tmp_path_factory) -> tuple[list[Example], list[Clip]]:
    """Frames around another mean for each gender; of one source 30 women, of the other 2 women and 6 men."""
    shard = tmp_path_factory.mktemp("frames") / "shard.npy"
    genders = ["female"] * 32 + ["male"] * 6
    random = np.random.default_rng(0)
    frames = [random.normal(1.0 if g == "male" else -1.0, 1.0, (20, WIDTH)).astype(np.float16) for g in genders]
    np.save(shard, np.concatenate(frames))
    examples = [
        Example(Path(f"{i}.wav"), speaker=f"s{i}", source="large" if i < 30 else "small", labels={"gender": gender})
        for i, gender in enumerate(genders)
    ]
    return examples, [Clip(i, shard, 20 * i, 20) for i in range(len(examples))]


def teacher(voices, head: ToneHead, labels=LABELS) -> ToneTeacher:
    examples, clips = voices
    return ToneTeacher(head, labels, examples, clips, Listener(examples, None, 320, []), STAGE, seed=0)


def test_labels_and_their_sources_are_heard_as_often_as_each_other(voices):
    drawn = [
        one
        for batch in range(40)
        for one in teacher(voices, ToneHead(frame_width=6, num_labels=(2,), llm_width=4))._drawn(batch)
    ]
    women = [index for _, label, _, index in drawn if label == 0]
    assert 0.4 < len(women) / len(drawn) < 0.6
    assert 0.4 < sum(index < 30 for index in women) / len(women) < 0.6


def test_a_head_learns_what_the_frames_tell(voices):
    torch.manual_seed(0)
    head = ToneHead(frame_width=WIDTH, num_labels=(2,), llm_width=4)
    own = teacher(voices, head)
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for batch in range(60):
        loss = own.losses(batch)["gender"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_an_attribute_that_no_example_has_is_refused(voices):
    with pytest.raises(TrainingError, match=r"projector\.tone: no example has a label for accent"):
        teacher(voices, ToneHead(frame_width=6, num_labels=(5,), llm_width=4), tone_labels(["accent"]))


def test_a_task_whose_answer_is_no_label_is_refused():
    with pytest.raises(TrainingError, match=r"projector\.tone: the answer to slots is no label"):
        tone_labels(["slots"])


def test_a_tone_stage_without_a_head_is_refused(tmp_path):
    recipe = yaml.safe_load(Path("jobs/train/mini.yaml").read_text(encoding="utf-8"))
    recipe["projector"].pop("tone")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(TrainingError, match=r"a tone stage wants `projector\.tone`"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_with_a_tone_stage_makes_a_bundle_that_is_told_the_tone(tiny_base, spoken, tmp_path, exporting):
    recipe = {
        "name": "toned",
        "parts": str(tiny_base.folder),
        "seed": 0,
        "manifests": ["train.jsonl"],
        "held_out_every": 2,
        "frame_passes": 1,
        "projector": {"width": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.0,
                      "tone": ["emotion", "speaker_count"]},
        "readout_tokens": 60,
        "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj"]},
        "precision": "float32",
        "stages": [
            {"name": "tone", "hearings_per_batch": 8, "stop": {"every": 5, "patience": 2},
             "schedule": {"steps": 10, "warmup_steps": 2, "learning_rate": {"tone": 1e-3}}},
            {"name": "tasks", "tokens_per_batch": 300, "questions": {"emotion": 1.0, "speaker_count": 0.5},
             "schedule": {"steps": 2, "warmup_steps": 1, "learning_rate": {"adapter": 1e-3}}},
        ],
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    arguments = ["train", str(path), "--data", str(spoken), "--output", str(tmp_path / "out")]
    with exporting():
        done = CliRunner().invoke(main, [*arguments, "--cache", str(tiny_base.cache)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    [measured] = [line for line in lines if line["stage"] == "tone" and line["step"] == 10 and "validation" not in line]
    assert {"emotion", "speaker_count"} <= measured.keys()
    assert (tmp_path / "out" / "tone-best.pt").exists()
