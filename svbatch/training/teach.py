"""The LLM's stages: questions with known answers asked of the frozen LLM; projector and adapter learn."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from svbatch.speech.projector import Projector
from svbatch.speech.readout import Readout, kept
from svbatch.tasks import prompts
from svbatch.training.align import ctc_loss, masked, padded_frames, stretched
from svbatch.training.questions import Question


class Teacher:
    """Losses of a batch of questions. `llm` is transformers' decoder with a LoRA adapter from peft."""

    def __init__(self, projector: Projector, readout: Readout, llm: nn.Module, tokenizer: Tokenizer) -> None:
        self._projector = projector
        self._readout = readout
        self._llm = llm
        self._tokenizer = tokenizer

    def losses(self, questions: Sequence[Question], *, ctc_weight: float) -> dict[str, Tensor]:
        """`answer`: cross-entropy per answer token; `ctc`: the read-out's, weighted. Both scalars with gradients."""
        frames, lengths = stretched(*padded_frames([q.clip for q in questions]))
        tokens = [self._tokenizer.encode(q.said, add_special_tokens=False).ids for q in questions]
        targets = [torch.tensor(self._readout.classes(ids), dtype=torch.long) for ids in tokens]
        ctc, speech, blank = ctc_loss(self._projector, self._readout, masked(frames, lengths), lengths, targets)
        vectors = [
            self._speech(speech[i], blank[i], int(lengths[i] + 3) // 4) if q.mode != "text" else speech[i, :0]
            for i, q in enumerate(questions)
        ]
        return {"answer": self._answer_loss(questions, vectors), "ctc": ctc_weight * ctc}

    def _speech(self, speech: Tensor, blank: Tensor, length: int) -> Tensor:
        """The embeddings of one row that a run would keep, (K, E)."""
        log_probs = self._readout.log_probs(speech[None, :length].detach(), blank[None, :length].detach())
        return speech[:length][kept(log_probs[0, :, 0].exp())]

    def _answer_loss(self, questions: Sequence[Question], speech: Sequence[Tensor]) -> Tensor:
        rows, answers = [], []
        embed = self._llm.get_input_embeddings()  # type: ignore[operator]
        for question, vectors in zip(questions, speech, strict=True):
            before, after = prompt_ids(self._tokenizer, question)
            answer = prompts.answer_ids(self._tokenizer, question.answer)
            parts = [
                embed(torch.tensor(before)),
                vectors.to(embed.weight.dtype),
                embed(torch.tensor(after + answer)),
            ]
            rows.append(torch.cat(parts))
            answers.append(torch.tensor(answer))
        lengths = torch.tensor([len(row) for row in rows])
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoder = self._llm.get_base_model().get_decoder()  # type: ignore[operator]
            hidden = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
            picked = [
                hidden[i, n - len(a) - 1 : n - 1]
                for i, (n, a) in enumerate(zip(lengths.tolist(), answers, strict=True))
            ]
            logits = torch.cat(picked) @ embed.weight.T
        return nn.functional.cross_entropy(logits.float(), torch.cat(answers))


def prompt_ids(tokenizer: Tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """Ids before and after the speech embeddings, up to the answer."""
    heard = [] if question.transcript is None else prompts.transcript_ids(tokenizer, question.transcript)
    return prompts.opening_ids(tokenizer), heard + prompts.question_ids(tokenizer, question.instruction)
