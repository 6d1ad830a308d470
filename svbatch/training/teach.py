"""The LLM's stages: questions with known answers asked of the frozen LLM; projector and adapter learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from svbatch.model import Precision
from svbatch.speech.projector import ConvolutionalProjector, Projector
from svbatch.speech.readout import Readout
from svbatch.tasks import prompts
from svbatch.training.align import ctc_loss, masked, padded_frames, posteriors, stretched
from svbatch.training.questions import Question


class Teacher:
    """Losses of a batch of questions. `llm` is transformers' model with a LoRA adapter from peft: a decoder alone,
    which reads all questions of a hearing side by side, or one with an encoder, which reads each for itself. A
    projector whose parameters are frozen has no CTC loss, nor has one without a read-out."""

    def __init__(
        self,
        projector: Projector | ConvolutionalProjector,
        readout: Readout | None,
        llm: Any,
        tokenizer: Tokenizer,
        *,
        precision: Precision = "bfloat16",
    ) -> None:
        self._projector = projector
        self._readout = readout
        self._llm = llm
        self._tokenizer = tokenizer
        self._precision: Precision = precision
        self._device: torch.device = llm.get_input_embeddings().weight.device
        self._answered = encoder_decoder_answers if llm.config.is_encoder_decoder else decoder_answers

    def losses(self, questions: Sequence[Question], *, ctc_weight: float) -> dict[str, Tensor]:
        """`text` and `label`: cross-entropy per token of open and of closed answers, where any were asked; `ctc`: the
        read-out's, weighted, if the projector learns. Scalars with gradients."""
        frames, lengths = stretched(*padded_frames([q.clip for q in questions]))
        frames, lengths = masked(frames, lengths).to(self._device), lengths.to(self._device)
        num_embeddings = -(-lengths // self._projector.downsampling)
        sizes = [0 if q.mode == "text" else size for q, size in zip(questions, num_embeddings.tolist(), strict=True)]
        if self._readout is None or not isinstance(self._projector, Projector):
            with self._autocast():
                speech = self._projector(frames, lengths)
            return self.answer_losses(questions, [speech[i, :size] for i, size in enumerate(sizes)])
        speech, log_probs, tone = posteriors(self._projector, self._readout, frames, lengths, self._precision)
        spoken = [self._readout.spoken(speech[i, :size], log_probs[i, :size]) for i, size in enumerate(sizes)]
        vectors = [torch.cat([tone[i], own]) if sizes[i] else own for i, own in enumerate(spoken)]
        losses = self.answer_losses(questions, vectors)
        rows = [i for i, question in enumerate(questions) if question.said is not None]
        if ctc_weight and log_probs.requires_grad and rows:
            tokens = [self._tokenizer.encode(questions[i].said or "", add_special_tokens=False).ids for i in rows]
            targets = [torch.tensor(self._readout.classes(ids), dtype=torch.long) for ids in tokens]
            losses["ctc"] = ctc_weight * ctc_loss(log_probs[rows], num_embeddings[rows], targets)
        return losses

    def answer_losses(self, questions: Sequence[Question], speech: Sequence[Tensor]) -> dict[str, Tensor]:
        """`text` and `label` of `losses`, given each question's speech embeddings (K, E)."""
        with self._autocast():
            each, closed = self._answered(self._llm, self._tokenizer, questions, speech)
        kinds = {"text": each[~closed], "label": each[closed]}
        return {kind: losses.mean() for kind, losses in kinds.items() if len(losses)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._precision == "bfloat16")


def encoder_decoder_answers(
    llm: Any, tokenizer: Tokenizer, questions: Sequence[Question], speech: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token of the answers, (N,), and whether it is a closed answer's, (N,) bool.

    The encoder reads [speech embeddings][transcript][instruction] of each pair, the decoder says the answer.
    """
    embed = llm.get_input_embeddings()
    rows, answers, closed = [], [], []
    for question, vectors in zip(questions, speech, strict=True):
        told = [] if question.transcript is None else prompts.transcript_ids(tokenizer, question.transcript)
        opening = prompts.opening_ids(tokenizer)
        for pair in question.pairs:
            asked = told + prompts.question_ids(tokenizer, pair.instruction)
            rows.append(torch.cat([_embedded(embed, opening), vectors.to(embed.weight.dtype), _embedded(embed, asked)]))
            answers.append(torch.tensor(prompts.answer_ids(tokenizer, pair.answer), device=vectors.device))
            closed.append(torch.full((len(answers[-1]),), pair.is_closed, device=vectors.device))
    lengths = torch.tensor([len(row) for row in rows], device=embed.weight.device)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    said = nn.utils.rnn.pad_sequence(answers, batch_first=True)
    before = torch.cat([torch.full_like(said[:, :1], llm.config.decoder_start_token_id), said[:, :-1]], dim=1)
    logits = llm.get_base_model()(
        inputs_embeds=padded,
        attention_mask=torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None],
        decoder_input_ids=before,
        use_cache=False,
    ).logits
    ends = torch.tensor([len(answer) for answer in answers], device=lengths.device)
    real = torch.arange(said.shape[1], device=lengths.device) < ends[:, None]
    each = nn.functional.cross_entropy(logits[real].float(), said[real], reduction="none")
    return each, torch.cat(closed)


def decoder_answers(
    llm: Any, tokenizer: Tokenizer, questions: Sequence[Question], speech: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """As `encoder_decoder_answers`. All pairs of a hearing follow one prefix, and none sees another; nor does a hearing
    see those that lie on its line."""
    embed = llm.get_input_embeddings()
    device = embed.weight.device
    prompts_of = [_laid_out(tokenizer, q, len(v)) for q, v in zip(questions, speech, strict=True)]
    rows = [
        torch.cat([embed(laid.before.to(device)), vectors.to(embed.weight.dtype), embed(laid.after.to(device))])
        for laid, vectors in zip(prompts_of, speech, strict=True)
    ]
    lines = _lines([len(row) for row in rows])
    size = max(len(row) for row in rows)
    mask = torch.stack([_padded_mask([prompts_of[i].sees() for i in line], size) for line in lines])[:, None]
    positions = [torch.cat([prompts_of[i].positions for i in line]) for line in lines]
    hidden = (
        llm.get_base_model()
        .get_decoder()(
            inputs_embeds=nn.utils.rnn.pad_sequence([torch.cat([rows[i] for i in line]) for line in lines], True),
            attention_mask=mask.to(device),
            position_ids=nn.utils.rnn.pad_sequence(positions, batch_first=True).to(device),
            use_cache=False,
        )
        .last_hidden_state
    )
    starts: dict[int, int] = {}
    for number, line in enumerate(lines):
        ends = accumulate((len(rows[i]) for i in line), initial=number * size)
        starts |= dict(zip(line, ends, strict=False))
    places = torch.cat([starts[i] + laid.answers - 1 for i, laid in enumerate(prompts_of)])
    logits = llm.get_output_embeddings()(hidden.flatten(0, 1)[places.to(device)])
    ids = torch.cat([laid.answer_ids for laid in prompts_of]).to(device)
    each = nn.functional.cross_entropy(logits.float(), ids, reduction="none")
    return each, torch.cat([laid.is_closed for laid in prompts_of]).to(device)


def _embedded(embed: nn.Module, ids: Sequence[int]) -> Tensor:
    weight: Any = embed.weight
    vectors: Tensor = embed(torch.tensor(ids, dtype=torch.int64, device=weight.device))
    return vectors


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

    def sees(self) -> Tensor:
        """(N, N), True where a place sees another: the prefix, and its own pair up to itself."""
        causal = torch.ones(len(self.pair), len(self.pair), dtype=torch.bool).tril()
        return causal & ((self.pair[None, :] == 0) | (self.pair[None, :] == self.pair[:, None]))


def _lines(lengths: Sequence[int]) -> list[list[int]]:
    """Rows laid side by side on lines as long as the longest, each on the first that has room for it, long ones first:
    of a batch with a line for each row two fifths would be padding."""
    lines: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        line = next((i for i, left in enumerate(room) if left >= lengths[row]), len(lines))
        if line == len(lines):
            lines.append([])
            room.append(max(lengths))
        lines[line].append(row)
        room[line] -= lengths[row]
    return lines


def _padded_mask(seen: Sequence[Tensor], size: int) -> Tensor:
    """(size, size) of one line; what is padded sees itself."""
    mask = torch.eye(size, dtype=torch.bool)
    start = 0
    for own in seen:
        end = start + len(own)
        mask[start:end, start:end] = own
        start = end
    return mask


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
