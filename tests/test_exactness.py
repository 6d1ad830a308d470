"""The shipped mini: what the engine shares, packs and batches changes no answer; what bfloat16 changes is measured."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from svbatch.ask import ask, mode_of, read
from svbatch.bundle import find_bundle
from svbatch.corpus.decode import decode
from svbatch.corpus.sources import iter_recordings
from svbatch.hear import Hearing, Span, hear
from svbatch.language.decoding import Question, greedy
from svbatch.language.scoring import score_many
from svbatch.language.weights import load_language_model
from svbatch.model import Model, llm_folder, load_model
from svbatch.tasks import prompts
from svbatch.tasks.task import Task, load_task

NAMES = ("intent", "emotion", "sentiment", "accent", "speaker_count", "language", "gender", "speech_activity")
KEYWORDS = {"keyword_search": {"keywords": ["the", "train", "doctor"]}}


def tasks() -> list[Task]:
    return [load_task(entry, Path()) for entry in (*NAMES, KEYWORDS)]


def heard(folder: Path, model: Model, *, every: int) -> list[Hearing]:
    recordings = list(iter_recordings([str(folder)], folder))[::every]
    spans = [Span(decode(recording).waveform, 0.0, transcribed=True) for recording in recordings]
    return [h for start in range(0, len(spans), 8) for h in hear(spans[start : start + 8], model) if h.has_speech]


def whole_prompt(hearing: Hearing, task: Task, question: str, model: Model) -> Tensor:
    """[opening][speech][transcript][instruction] of one question, (L, E)."""
    embed, tokenizer = model.llm.embed, model.tokenizer
    parts = [embed(torch.tensor(prompts.opening_ids(tokenizer))), hearing.speech.to(model.llm.dtype)]
    if mode_of(task) == "both":
        parts.append(embed(torch.tensor(prompts.transcript_ids(tokenizer, hearing.text))))
    return torch.cat([*parts, embed(torch.tensor(prompts.question_ids(tokenizer, question)))])


@pytest.fixture(scope="module")
def plain(mini) -> torch.nn.Module:
    """The same weights in transformers' own model, with its own attention."""
    bundle = find_bundle("mini")
    adapter = bundle.manifest.adapter
    assert adapter is not None
    folder = bundle.path(adapter.weights).parent
    llm = load_language_model(llm_folder(bundle, torch.float32), torch.float32, adapter_dir=folder)
    llm.model.set_attn_implementation("sdpa")
    return llm.model


@pytest.mark.slow
def test_shared_and_packed_scores_are_those_of_each_label_alone_in_full(held_out_data, mini, plain):
    with torch.inference_mode():
        hearings = heard(held_out_data / "dev" / "librispeech_devclean", mini, every=16)
        worst, compared = 0.0, 0
        for mode in ("audio", "both"):
            asked = [(task, q) for task in tasks() if mode_of(task) == mode for q in task.questions()]
            questions = [
                (
                    prompts.question_ids(mini.tokenizer, question),
                    [prompts.answer_ids(mini.tokenizer, label) for label in task.scored],
                )
                for task, question in asked
            ]
            scores = score_many(mini.llm, read(hearings, mode, mini), questions)
            for (task, question), (_, labels), found in zip(asked, questions, scores, strict=True):
                for row, hearing in enumerate(hearings):
                    prompt = whole_prompt(hearing, task, question, mini)
                    for column, label in enumerate(labels):
                        embeddings = torch.cat([prompt, mini.llm.embed(torch.tensor(label[:-1], dtype=torch.int64))])
                        logits = plain(inputs_embeds=embeddings[None]).logits[0, len(prompt) - 1 :].log_softmax(-1)
                        alone = float(logits[torch.arange(len(label)), torch.tensor(label)].sum())
                        worst = max(worst, abs(alone - float(found[row, column])))
                        compared += 1
    print(f"\n{compared} label scores differ by at most {worst:.1e}")
    assert worst < 1e-3


@pytest.mark.slow
def test_texts_are_those_of_transformers_generate(held_out_data, mini, plain):
    with torch.inference_mode():
        hearings = heard(held_out_data / "dev" / "librispeech_devclean", mini, every=16)
        translation = load_task("translation", Path())
        [question] = translation.questions()
        end_id = prompts.end_id(mini.tokenizer)
        ids = prompts.question_ids(mini.tokenizer, question)
        [found] = greedy(mini.llm, read(hearings, "both", mini), [Question(ids, 40)], end_id=end_id)
        for hearing, answer in zip(hearings, found, strict=True):
            prompt = whole_prompt(hearing, translation, question, mini)[None]
            mask = torch.ones(prompt.shape[:2], dtype=torch.int64)
            options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": end_id, "pad_token_id": end_id}
            said = plain.generate(inputs_embeds=prompt, attention_mask=mask, **options)[0].tolist()
            expected = [token for token in said if token != end_id]
            assert answer.ids == expected[: len(answer.ids)]
            assert answer.finish_reason == "loop" or len(answer.ids) == len(expected)


@pytest.mark.slow
def test_how_much_bfloat16_changes(held_out_data, mini, capsys):
    """A measurement; a label may flip where two are near a tie."""
    rounded = load_model(find_bundle("mini"), "cpu", "bfloat16")
    asked = [*tasks(), load_task({"asr": {"via": "llm"}}, Path())]
    with torch.inference_mode():
        folder = held_out_data / "dev" / "speechocean762"
        exact, other = (ask(asked, heard(folder, model, every=2), model) for model in (mini, rounded))
    changed, probabilities, texts = [], [], []
    for task in asked:
        for one, two in zip(exact[task.name], other[task.name], strict=True):
            assert isinstance(one, dict)
            assert isinstance(two, dict)
            if task.name == "asr":
                texts.append(one["text"] != two["text"])
            elif task.name == "keyword_search":
                for left, right in zip(one["keywords"], two["keywords"], strict=True):
                    changed.append(left["present"] != right["present"])
                    probabilities.append(abs(left["probability"] - right["probability"]))
            else:
                changed.append(one["label"] != two["label"])
                probabilities.append(abs(one["probability"] - two["probability"]))
    mean, most = sum(probabilities) / len(probabilities), max(probabilities)
    with capsys.disabled():
        print(f"\n{sum(changed)} of {len(changed)} labels differ; probabilities by {mean:.4f}, at most {most:.3f}")
        print(f"{sum(texts)} of {len(texts)} transcripts by the LLM differ")
    assert sum(changed) < 0.05 * len(changed)
