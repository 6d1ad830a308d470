from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSeq2SeqLM

from svbatch.speech.projector import ConvolutionalProjector
from svbatch.tasks import prompts
from svbatch.training.frames import Clip
from svbatch.training.questions import Pair, Question
from svbatch.training.recipe import load_recipe
from svbatch.training.shape import with_adapter
from svbatch.training.teach import Teacher

CLIP = Clip(0, Path("shard.npy"), 0, 100)
PAIRS = (
    Pair("is rain said", "yes", is_closed=True),
    Pair("is train said", "no", is_closed=True),
    Pair("what is said", "the rain", is_closed=False),
)


@pytest.fixture(scope="module")
def speech(tiny_parts) -> torch.Tensor:
    return torch.randn(7, tiny_parts.readout.embeddings.shape[1], generator=torch.Generator().manual_seed(3))


def alone(parts, speech: torch.Tensor, transcript: str | None, instruction: str, answer: str) -> float:
    """The judge: one prompt with one answer, read by a plain causal pass; the sum over the answer's tokens."""
    embed = parts.llm.get_input_embeddings()
    heard = [] if transcript is None else prompts.transcript_ids(parts.tokenizer, transcript)
    said = prompts.answer_ids(parts.tokenizer, answer)
    after = heard + prompts.question_ids(parts.tokenizer, instruction) + said
    opening = embed(torch.tensor(prompts.opening_ids(parts.tokenizer)))
    row = torch.cat([opening, speech.to(opening), embed(torch.tensor(after))])[None]
    logits = parts.llm(inputs_embeds=row).logits[0, -len(said) - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum"))


@pytest.mark.parametrize("transcript", [None, "the rain in the train"])
def test_every_pair_of_a_batch_is_learnt_as_if_it_was_asked_alone(tiny_parts, speech, transcript):
    parts = tiny_parts
    teacher = Teacher(parts.projector, parts.readout, parts.llm, parts.tokenizer, precision="float32")
    mode = "audio" if transcript is None else "both"
    heard_of = [(speech[:3], PAIRS[:1]), (speech, PAIRS), (speech[2:], PAIRS[2:]), (speech[:1], PAIRS[1:2])]
    questions = [Question(CLIP, mode, transcript, pairs, "") for _, pairs in heard_of]  # short ones share a line
    asked = [(heard, pair) for heard, pairs in heard_of for pair in pairs]
    with torch.inference_mode():
        together = teacher.answer_losses(questions, [heard for heard, _ in heard_of])
        judged = [(pair, alone(parts, heard, transcript, pair.instruction, pair.answer)) for heard, pair in asked]
    for kind, is_closed in (("label", True), ("text", False)):
        own = [(pair, loss) for pair, loss in judged if pair.is_closed == is_closed]
        num_tokens = sum(len(prompts.answer_ids(parts.tokenizer, pair.answer)) for pair, _ in own)
        assert float(together[kind]) == pytest.approx(sum(loss for _, loss in own) / num_tokens, rel=1e-4)


def test_what_was_not_asked_has_no_loss(tiny_parts, speech):
    parts = tiny_parts
    teacher = Teacher(parts.projector, parts.readout, parts.llm, parts.tokenizer)
    with torch.inference_mode():
        assert teacher.answer_losses([Question(CLIP, "audio", None, PAIRS[:2], "")], [speech]).keys() == {"label"}


@pytest.mark.parametrize("transcript", [None, "the rain"])
def test_an_llm_with_an_encoder_learns_each_pair_as_if_asked_alone(paper_recipe, tmp_path, transcript):
    recipe = load_recipe(paper_recipe(tmp_path, "wavlm"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "llm" / "tokenizer.json"))
    llm = with_adapter(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "llm"), recipe.adapter).eval()
    projector = ConvolutionalProjector(encoder_width=4, llm_width=32, strides=[2, 2])
    teacher = Teacher(projector, None, llm, tokenizer, precision="float32")
    speech = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    mode = "audio" if transcript is None else "both"
    questions = [Question(CLIP, mode, transcript, PAIRS, None), Question(CLIP, mode, transcript, PAIRS[:1], None)]
    asked = [*((speech, pair) for pair in PAIRS), (speech[:3], PAIRS[0])]
    with torch.inference_mode():
        together = teacher.answer_losses(questions, [speech, speech[:3]])
        judged = [plain_t5(llm, tokenizer, heard, transcript, pair) for heard, pair in asked]
    closed = torch.cat([losses for losses, pair in judged if pair.is_closed])
    torch.testing.assert_close(together["label"], closed.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together["text"], judged[2][0].mean(), rtol=1e-4, atol=1e-5)


def plain_t5(llm, tokenizer, speech, transcript, pair) -> tuple[torch.Tensor, Pair]:
    """The judge: transformers' own forward pass of one prompt, the cross-entropy of each token of its answer."""
    told = [] if transcript is None else prompts.transcript_ids(tokenizer, transcript)
    read = torch.tensor(told + prompts.question_ids(tokenizer, pair.instruction))
    row = torch.cat([speech, llm.get_input_embeddings()(read)])[None]
    said = torch.tensor(prompts.answer_ids(tokenizer, pair.answer))
    logits = llm.get_base_model()(inputs_embeds=row, decoder_input_ids=torch.cat([torch.tensor([0]), said[:-1]])[None])
    return torch.nn.functional.cross_entropy(logits.logits[0], said, reduction="none"), pair
