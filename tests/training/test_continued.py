import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from svbatch.errors import TrainingError
from svbatch.training.checkpoints import trainable_state
from svbatch.training.continued import note_start, require_same_start, take_up
from svbatch.training.data import Example
from svbatch.training.recipe import Recipe
from svbatch.training.stages import build

BOTH = ["projector", "adapter"]
OTHERS = [Example(Path("other.wav"), text="refund the invoice", lang="en")]


def test_what_learns_begins_as_the_bundles_own(tiny_bundle, tiny_recipe, tiny_parts):
    goes_on = tiny_recipe.model_copy(update={"continues": BOTH, "seed": 7, "readout_tokens": 10})
    parts = build(goes_on, tiny_bundle, OTHERS)
    for ours, theirs in ((parts.projector, tiny_parts.projector), (parts.llm, tiny_parts.llm)):
        wanted = trainable_state(theirs)
        found = trainable_state(ours)
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name].cpu(), weight.half().float().cpu(), msg=name)
    assert parts.readout is not None
    assert tiny_parts.readout is not None
    assert parts.readout.token_ids.tolist() == tiny_parts.readout.token_ids.tolist()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_words_for_a_voice_are_the_bundles_whatever_the_llm_is_rounded_to(tiny_bundle, tiny_recipe, precision):
    goes_on = tiny_recipe.model_copy(update={"continues": BOTH, "precision": precision})
    learnt = load_file(tiny_bundle.path(tiny_bundle.manifest.projector.weights))
    torch.testing.assert_close(
        build(goes_on, tiny_bundle, OTHERS).projector.tone.words.half(), learnt["tone.words"], rtol=0, atol=0
    )


def test_a_projector_of_another_shape_is_refused(tiny_bundle, tiny_recipe):
    wider = tiny_recipe.projector.model_copy(update={"width": 64})
    goes_on = tiny_recipe.model_copy(update={"continues": BOTH, "projector": wider})
    with pytest.raises(TrainingError, match=r"continues: projector\.width is 64 in the recipe, and \d+ in "):
        build(goes_on, tiny_bundle, OTHERS)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("adapter", "rank", 3), ("adapter", "alpha", 32), ("projector", "num_heads", 1), ("projector", "strides", [4, 1])],
)
def test_what_would_change_what_the_weights_mean_is_refused(tiny_bundle, tiny_recipe, part, key, value):
    """But for the rank, the weights would fit."""
    other = getattr(tiny_recipe, part).model_copy(update={key: value})
    goes_on = tiny_recipe.model_copy(update={"continues": BOTH, part: other})
    with pytest.raises(TrainingError, match=rf"continues: {part}\.{key} is {re.escape(str(value))} in the recipe"):
        build(goes_on, tiny_bundle, OTHERS)


def test_another_dropout_is_not(tiny_bundle, tiny_recipe):
    other = tiny_recipe.projector.model_copy(update={"dropout": 0.3})
    build(tiny_recipe.model_copy(update={"continues": BOTH, "projector": other}), tiny_bundle, OTHERS)


def test_a_training_that_began_with_another_bundle_does_not_go_on(tiny_bundle, tiny_base, tiny_recipe, tmp_path):
    goes_on = tiny_recipe.model_copy(update={"continues": BOTH})
    note_start(goes_on, tiny_base, tmp_path)
    require_same_start(goes_on, tiny_bundle, tmp_path)  # nothing has learnt yet
    note_start(goes_on, tiny_bundle, tmp_path)
    (tmp_path / "all.pt").touch()
    require_same_start(goes_on, tiny_bundle, tmp_path)
    with pytest.raises(TrainingError, match=f"began with {tiny_bundle.id}, and would go on from {tiny_base.id}"):
        require_same_start(goes_on, tiny_base, tmp_path)
    with pytest.raises(TrainingError, match=f"began with {tiny_bundle.id}, and would go on from none"):
        require_same_start(tiny_recipe, tiny_bundle, tmp_path)


def test_labels_of_the_voice_that_are_others_are_refused(tiny_bundle, tiny_recipe, tiny_parts):
    fewer = tiny_recipe.model_copy(update={"projector": tiny_recipe.projector.model_copy(update={"tone": ["gender"]})})
    other = build(fewer, tiny_bundle, OTHERS).projector
    with pytest.raises(TrainingError, match=r"continues: \d+ tensors of the recipe's projector are not as in .*first:"):
        take_up(tiny_recipe.model_copy(update={"continues": ["projector"]}), tiny_bundle, other, tiny_parts.llm)


def test_a_bundle_that_has_learnt_nothing_is_refused(tiny_base, tiny_recipe):
    with pytest.raises(TrainingError, match="no projector or adapter to go on from"):
        build(tiny_recipe.model_copy(update={"continues": BOTH}), tiny_base, OTHERS)


def test_a_recipe_that_continues_names_a_bundle(tiny_recipe):
    fields = tiny_recipe.model_dump() | {"continues": BOTH, "parts": None}
    part = {"source": "here", "licence": "CC0-1.0", "config": {}}
    with pytest.raises(ValidationError, match="goes on from the bundle that `parts` names"):
        Recipe.model_validate(fields | {"encoder": part, "llm": part})


def test_a_recipe_that_continues_needs_no_tone_stage(tiny_recipe):
    fields = tiny_recipe.model_dump()
    fields["stages"] = [stage for stage in fields["stages"] if "hearings_per_batch" not in stage]
    Recipe.model_validate(fields | {"continues": BOTH})
    with pytest.raises(ValidationError, match="learnt by a tone stage alone"):
        Recipe.model_validate(fields)


def test_a_projector_continues_without_its_adapter(tiny_bundle, tiny_recipe, tiny_parts):
    parts = build(tiny_recipe.model_copy(update={"continues": ["projector"]}), tiny_bundle, OTHERS)
    wanted = trainable_state(tiny_parts.projector)
    for name, weight in trainable_state(parts.projector).items():
        torch.testing.assert_close(weight, wanted[name].half().float(), msg=name)
    for name, weight in trainable_state(parts.llm).items():
        assert ("lora_B" in name) == (not weight.any()), name
