"""The LLM's stages: questions with known answers asked of the frozen LLM; projector and adapter learn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from svbatch.speech.projector import Projector, num_embeddings
from svbatch.speech.readout import Readout
from svbatch.tasks import prompts
from svbatch.training.align import ctc_loss, masked, padded_frames, posteriors, stretched
from svbatch.training.questions import Question


class Teacher:
    """Losses of a batch of questions. `llm` is transformers' decoder with a LoRA adapter from peft. A
    projector whose parameters are frozen has no CTC loss."""

    def __init__(self, projector: Projector, readout: Readout, llm: nn.Module, tokenizer: Tokenizer) -> None:
        self._projector = projector
        self._readout = readout
        self._llm = llm
        self._tokenizer = tokenizer

    def losses(self, questions: Sequence[Question], *, ctc_weight: float) -> dict[str, Tensor]:
        """`text` and `label`: cross-entropy per token of open and of closed answers, where any were asked; `ctc`: the
        read-out's, weighted, if the projector learns. Scalars with gradients."""
        frames, lengths = stretched(*padded_frames([q.clip for q in questions]))
        frames = masked(frames, lengths)
        speech, log_probs = posteriors(self._projector, self._readout, frames, lengths)
        sizes = [
            num_embeddings(length) if q.mode != "text" else 0
            for q, length in zip(questions, lengths.tolist(), strict=True)
        ]
        vectors = [self._readout.spoken(speech[i, :size], log_probs[i, :size]) for i, size in enumerate(sizes)]
        losses = self.answer_losses(questions, vectors)
        if log_probs.requires_grad:
            tokens = [self._tokenizer.encode(q.said, add_special_tokens=False).ids for q in questions]
            targets = [torch.tensor(self._readout.classes(ids), dtype=torch.long) for ids in tokens]
            losses["ctc"] = ctc_weight * ctc_loss(log_probs, lengths, targets)
        return losses

    def answer_losses(self, questions: Sequence[Question], speech: Sequence[Tensor]) -> dict[str, Tensor]:
        """`text` and `label` of `losses`, given each question's speech embeddings (K, E)."""
        embed = self._llm.get_input_embeddings()  # type: ignore[operator]
        prompts_of = [_laid_out(self._tokenizer, q, len(v)) for q, v in zip(questions, speech, strict=True)]
        rows = [
            torch.cat([embed(laid.before), vectors.to(embed.weight.dtype), embed(laid.after)])
            for laid, vectors in zip(prompts_of, speech, strict=True)
        ]
        size = max(len(row) for row in rows)
        mask = torch.stack([laid.mask(size) for laid in prompts_of])[:, None]
        positions = nn.utils.rnn.pad_sequence([laid.positions for laid in prompts_of], batch_first=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoder = self._llm.get_base_model().get_decoder()  # type: ignore[operator]
            hidden = decoder(
                inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True),
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
            places = torch.cat([i * hidden.shape[1] + laid.answers - 1 for i, laid in enumerate(prompts_of)])
            logits = hidden.flatten(0, 1)[places] @ embed.weight.T
        ids = torch.cat([laid.answer_ids for laid in prompts_of])
        each = nn.functional.cross_entropy(logits.float(), ids, reduction="none")
        closed = torch.cat([laid.is_closed for laid in prompts_of])
        kinds = {"text": each[~closed], "label": each[closed]}
        return {kind: losses.mean() for kind, losses in kinds.items() if len(losses)}


@dataclass(frozen=True)
class _Laid:
    """One row: ids before and after the speech embeddings, and for each of its N places its position, and the pair
    it belongs to (0: the prefix that all pairs see). `answers` are the places of the answers' tokens, `is_closed`
    says of each whether its answer is a label."""

    before: Tensor
    after: Tensor
    positions: Tensor
    pair: Tensor
    answers: Tensor
    answer_ids: Tensor
    is_closed: Tensor

    def mask(self, size: int) -> Tensor:
        """(size, size), True where a place sees another: the prefix, and its own pair up to itself."""
        causal = torch.ones(len(self.pair), len(self.pair), dtype=torch.bool).tril()
        seen = causal & ((self.pair[None, :] == 0) | (self.pair[None, :] == self.pair[:, None]))
        padded = torch.eye(size, dtype=torch.bool)
        padded[: len(seen), : len(seen)] = seen
        return padded


def _laid_out(tokenizer: Tokenizer, question: Question, num_vectors: int) -> _Laid:
    before = prompts.opening_ids(tokenizer)
    after = [] if question.transcript is None else prompts.transcript_ids(tokenizer, question.transcript)
    num_prefix = len(before) + num_vectors + len(after)
    positions, pair = list(range(num_prefix)), [0] * num_prefix
    answers: list[int] = []
    answer_ids: list[int] = []
    is_closed: list[bool] = []
    for number, asked_of in enumerate(question.pairs, 1):
        asked = prompts.question_ids(tokenizer, asked_of.instruction)
        said = prompts.answer_ids(tokenizer, asked_of.answer)
        start = len(pair) + len(asked)
        answers += range(start, start + len(said))
        answer_ids += said
        is_closed += [asked_of.is_closed] * len(said)
        after += asked + said
        positions += range(num_prefix, num_prefix + len(asked) + len(said))
        pair += [number] * (len(asked) + len(said))
    return _Laid(*(torch.tensor(each) for each in (before, after, positions, pair, answers, answer_ids, is_closed)))
