from pathlib import Path

import numpy as np
import pytest
import torch

from svbatch.training.align import posteriors
from svbatch.training.frames import Clip
from svbatch.training.questions import Pair, Question
from svbatch.training.stages import mishearing
from svbatch.training.teach import Teacher


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    shard = tmp_path_factory.mktemp("frames") / "shard.npy"
    np.save(shard, np.random.default_rng(0).normal(size=(80, 64)).astype(np.float16))
    return Clip(0, Path(shard), 0, 80)


def test_a_projector_that_mishears_reads_otherwise_and_is_itself_again_afterwards(tiny_parts, clip):
    projector = tiny_parts.projector.eval()
    frames = torch.from_numpy(clip.read()).float()[None]

    def read() -> torch.Tensor:
        with torch.no_grad():
            return posteriors(projector, tiny_parts.readout, frames, torch.tensor([80]))[1]

    before = read()
    torch.manual_seed(0)
    with mishearing(projector, 0.45):
        first, second = read(), read()
    assert not torch.allclose(first, before)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(read(), before)
    assert all(parameter.requires_grad for parameter in projector.parameters())


def test_what_does_not_learn_has_neither_a_ctc_loss_nor_gradients(tiny_parts, clip):
    question = Question(clip, "audio", None, (Pair("what is said", " the rain", is_closed=False),), " the rain")
    teacher = Teacher(tiny_parts.projector, tiny_parts.readout, tiny_parts.llm, tiny_parts.tokenizer)
    with mishearing(tiny_parts.projector, 0.45):
        losses = teacher.losses([question], ctc_weight=0.3)
        losses["text"].backward()
    assert losses.keys() == {"text"}
    assert all(parameter.grad is None for parameter in tiny_parts.projector.parameters())
    tiny_parts.llm.zero_grad(set_to_none=True)
    tiny_parts.projector.train()
    assert teacher.losses([question], ctc_weight=0.3).keys() == {"text", "ctc"}
    tiny_parts.projector.eval()
