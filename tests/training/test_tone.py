import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from svbatch.bundle import find_bundle
from svbatch.errors import TrainingError
from svbatch.hear import Span, hear
from svbatch.model import load_encoder, load_model
from svbatch.speech.encoder import encode
from svbatch.speech.projector import Projector, ProjectorConfig
from svbatch.training.data import Example
from svbatch.training.frames import Clip
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
    """Frames around another mean for each gender; of one source 27 women, of another 3 women and 6 men, of whom the
    last has two clips."""
    shard = tmp_path_factory.mktemp("frames") / "shard.npy"
    genders = ["female"] * 30 + ["male"] * 7
    random = np.random.default_rng(0)
    frames = [random.normal(1.0 if g == "male" else -1.0, 1.0, (20, WIDTH)).astype(np.float16) for g in genders]
    np.save(shard, np.concatenate(frames))
    examples = [
        Example(
            Path(f"{i}.wav"), speaker=f"s{min(i, 35)}", source="large" if i < 27 else "small", labels={"gender": gender}
        )
        for i, gender in enumerate(genders)
    ]
    return examples, [Clip(i, shard, 20 * i, 20) for i in range(len(examples))]


def projector(*num_labels: int, voice_width: int = 0) -> Projector:
    torch.manual_seed(0)
    sizes = {"encoder_width": WIDTH - voice_width, "width": 8, "llm_width": 4}
    return Projector(ProjectorConfig(**sizes, voice_width=voice_width, tone=num_labels))


def teacher(voices, projector: Projector, labels=LABELS) -> ToneTeacher:
    examples, clips = voices
    return ToneTeacher(projector, labels, examples, clips, STAGE, seed=0)


def test_labels_are_heard_as_often_as_each_other_their_sources_by_the_root_of_their_speakers(voices):
    own = teacher(voices, projector(2))
    drawn = [one for batch in range(60) for one in own._drawn(batch)]
    women = [index for _, label, _, index in drawn if label == 0]
    assert 0.45 < len(women) / len(drawn) < 0.55
    assert 0.69 < sum(index < 27 for index in women) / len(women) < 0.81  # root of 27 to root of 3
    men = [index for _, label, _, index in drawn if label == 1]
    assert 0.1 < sum(index >= 35 for index in men) / len(men) < 0.24  # one speaker of six, whose clips are two


def test_the_head_is_given_the_columns_for_the_voice_alone():
    one = projector(2, voice_width=2)
    frames = torch.randn(1, 20, WIDTH)
    torch.testing.assert_close(one.voice(frames), frames[:, :, 4:])
    changed = frames.clone()
    changed[:, :, :4] += 1
    before, after = (one.eval()(given, torch.tensor([20])) for given in (frames, changed))
    torch.testing.assert_close(before[2], after[2])
    assert not torch.allclose(before[0], after[0])


def test_a_head_learns_what_the_frames_tell(voices):
    whole = projector(2)
    own = teacher(voices, whole)
    optimiser = torch.optim.AdamW(whole.tone.parameters(), lr=3e-3)
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
        teacher(voices, projector(5), tone_labels(["accent"]))


def test_a_task_whose_answer_is_no_label_is_refused():
    with pytest.raises(TrainingError, match=r"projector\.tone: the answer to slots is no label"):
        tone_labels(["slots"])


def test_a_tone_stage_without_a_head_is_refused(tmp_path):
    recipe = yaml.safe_load(Path("jobs/train/mini.yaml").read_text(encoding="utf-8"))
    recipe["projector"].pop("tone")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(TrainingError, match=r"a tone stage wants `projector\.tone`"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_with_a_tone_stage_makes_a_bundle_that_is_told_the_tone(tiny_base, bursts, spoken, trained):
    recipe = {
        "name": "toned",
        "parts": str(tiny_base.folder),
        "seed": 0,
        "manifests": ["train.jsonl"],
        "held_out_every": 2,
        "frame_passes": 1,
        "projector": {"width": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.0,
                      "tone": ["emotion", "speaker_count"], "voice_layer": 1},
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
    output = trained(recipe, spoken, tiny_base.cache)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    [measured] = [line for line in lines if line["stage"] == "tone" and line["step"] == 10 and "validation" not in line]
    assert "emotion" in measured
    assert (output / "tone-best.pt").exists()
    made = load_model(find_bundle(str(output / "bundle"), cache=tiny_base.cache), "cpu", "float32")
    sound = bursts(2.0, seed=1)
    [hearing] = hear([Span(sound, 0.0, transcribed=False)], made)
    assert len(hearing.speech) > 2
    frames = encode(load_encoder(tiny_base, "cpu"), [sound])
    wide = encode(made.encoder, [sound])
    np.testing.assert_allclose(wide[:, :, : frames.shape[2]], frames, atol=1e-5)
    [alone], [beside] = (made.recogniser.transcribe(torch.from_numpy(given)) for given in (frames, wide))
    assert alone == beside
