from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from svbatch.errors import BundleError, TrainingError
from svbatch.training.checkpoints import trainable_state
from svbatch.training.data import Example
from svbatch.training.recipe import AdapterShape, Recipe
from svbatch.training.stages import build

BOTH = ["projector", "adapter"]
OTHERS = [Example(Path("other.wav"), text="refund the invoice", lang="en")]


def test_what_learns_begins_as_the_bundles_own(tiny_bundle, tiny_recipe, tiny_parts):
    goes_on = tiny_recipe.model_copy(update={"continues": BOTH, "seed": 7})
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


def test_a_projector_of_another_shape_is_refused(tiny_bundle, tiny_recipe):
    wider = tiny_recipe.projector.model_copy(update={"width": 64})
    goes_on = tiny_recipe.model_copy(update={"continues": BOTH, "projector": wider})
    with pytest.raises(TrainingError, match=r"continues: \d+ tensors of the recipe's projector are not as in .*first:"):
        build(goes_on, tiny_bundle, OTHERS)


def test_an_adapter_of_another_rank_is_refused(tiny_bundle, tiny_recipe):
    other = AdapterShape(rank=3, alpha=4, targets=["q_proj", "down_proj"])
    goes_on = tiny_recipe.model_copy(update={"continues": BOTH, "adapter": other})
    with pytest.raises(BundleError, match="fit nothing in the LLM"):
        build(goes_on, tiny_bundle, OTHERS)


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
