"""From scores to honest probabilities: what is fitted for each closed task on recordings held out of training."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svbatch.bundle import Calibration
from svbatch.model import Model
from svbatch.training.data import Example
from svbatch.training.listening import Judged, asked_keywords, asked_labels, asked_speaker_counts, heard_examples

MIN_ANSWERS = 20
BY_VOICE = ("emotion", "accent", "gender", "language")
BY_WORDS = ("sentiment", "intent")
LEAST_PROBABILITY = 1e-12


def calibrate(
    examples: Sequence[Example], told: Sequence[Example], model: Model, *, seed: int
) -> dict[str, Calibration]:
    """By closed task, the calibration at which `examples` are most likely, every label weighing the same: how often
    each occurs is another thing in a user's recordings. They must be held out of training.

    So must be `told`, which count for tasks that are told by words alone: they may be synthesised, and are then no
    measure of voices. A task that MIN_ANSWERS of them do not answer has none.
    """
    heard = list(heard_examples(examples, model))
    fitted: dict[str, Calibration] = {}
    known = [each for each in heard if each.example.labels.get("speech") is not None]
    if len(known) >= MIN_ANSWERS:
        probabilities = [[p["probability"] for p in each.activity["probabilities"]] for each in known]
        truths = [0 if each.example.labels["speech"] else 1 for each in known]
        fitted["speech_activity"] = Calibration(temperature=fitted_temperature(probabilities, truths))
    asked = [a for a in asked_keywords(heard, model, seed) if a.evidence is not None]
    if len(asked) >= MIN_ANSWERS:
        fitted["keyword_search"] = fitted_spotting(
            [a.probability for a in asked],
            [a.evidence or 0.0 for a in asked],
            [a.written for a in asked],
            [a.truth for a in asked],
        )
    judged = {name: asked_labels(name, heard, model) for name in BY_VOICE}
    heard += heard_examples(told, model)
    judged |= {name: asked_labels(name, heard, model) for name in BY_WORDS}
    judged["speaker_count"] = asked_speaker_counts(examples, model, seed)
    return fitted | _fitted(judged)


def calibrate_reader(examples: Sequence[Example], model: Model) -> dict[str, Calibration]:
    """As `calibrate`, of a model that is given transcripts alone: a cascade's."""
    worded = [example for example in examples if not example.labels.keys().isdisjoint(BY_WORDS)]
    heard = list(heard_examples(worded, model))
    return _fitted({name: asked_labels(name, heard, model, is_read=True) for name in BY_WORDS})


def _fitted(judged: Mapping[str, Judged]) -> dict[str, Calibration]:
    return {name: fitted_labels(own) for name, own in judged.items() if len(own.truths) >= MIN_ANSWERS}


def fitted_labels(judged: Judged) -> Calibration:
    """A temperature and the share of the LLM's habit that is taken off, 0 to 1; where the voice is read too, the weight
    of its log-probabilities with them, by multinomial logistic regression in which each truth counts as in
    `fitted_temperature`. No weight is negative."""
    scores = torch.tensor(judged.probabilities, dtype=torch.float64).clamp(min=LEAST_PROBABILITY).log()
    voice = torch.tensor(judged.voice, dtype=torch.float64) if judged.voice else torch.zeros_like(scores)
    habit = torch.tensor(judged.habit, dtype=torch.float64)
    num_answers, num_labels = scores.shape
    doubt = 1 / (num_answers + 2)
    targets = torch.full(scores.shape, doubt / (num_labels - 1), dtype=torch.float64)
    targets[torch.arange(num_answers), judged.truths] = 1 - doubt
    shares = torch.from_numpy(_shares(judged.truths))

    def loss(weights: Tensor) -> Tensor:
        of_llm, of_voice, share = _within(weights)
        logits = (scores - share * habit) * of_llm + voice * of_voice
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none") @ shares

    of_llm, of_voice, share = map(float, _within(_minimised(loss, [0.0, -1.0, 0.0])))
    return Calibration(
        temperature=round(1 / of_llm, 4),
        habit=round(share, 4),
        voice=round(of_voice, 4) if judged.voice else 0.0,
        labels=list(judged.labels),
    )


def _within(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of LLM and voice from 1/20 to 20, and a share from 0 to 1. Smooth: behind an edge there is no gradient,
    and a search that has stepped over it stays there."""
    of_llm, of_voice = (3 * torch.tanh(weights[:2] / 3)).exp()
    return of_llm, of_voice, weights[2].sigmoid()


def fitted_temperature(probabilities: Sequence[Sequence[float]], truths: Sequence[int]) -> float:
    """The temperature from 0.25 to 20 at which the true answers are most likely (Guo et al., ICML 2017).

    `probabilities` (N, L) are those at temperature 1; `truths` (N,) the places of the true answers. Each truth counts
    as 1 - 1 / (N + 2) of an answer, so that N right ones do not promise that the next is (Platt, 1999).
    """
    logits = np.log(np.clip(np.asarray(probabilities, dtype=np.float64), LEAST_PROBABILITY, None))
    num_answers, num_labels = logits.shape
    doubt = 1 / (num_answers + 2)
    targets = np.full(logits.shape, doubt / (num_labels - 1))
    targets[np.arange(num_answers), list(truths)] = 1 - doubt
    candidates = np.geomspace(0.25, 20.0, 200)
    shares = _shares(truths)

    def loss(temperature: float) -> float:
        scaled = logits / temperature
        log_probs = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
        return -float((targets * log_probs).sum(axis=1) @ shares)

    return round(float(min(candidates, key=loss)), 4)


def _shares(truths: Sequence[int]) -> NDArray[np.float64]:
    """How much each answer weighs, (N,), in all 1: every label that occurs as much as another."""
    shares = 1 / np.bincount(truths)[list(truths)]
    weighed: NDArray[np.float64] = shares / shares.sum()
    return weighed


def fitted_spotting(
    probabilities: Sequence[float], evidence: Sequence[float], written: Sequence[float], truths: Sequence[bool]
) -> Calibration:
    """Weights of the LLM's log-odds of yes, of the read-out's evidence and the transcript's, and of none of them, by
    logistic regression (Platt, 1999).

    `probabilities` (N,) of yes are those at temperature 1. The LLM's weight, 1 / temperature, stays above 0.
    """
    yes = torch.tensor(probabilities, dtype=torch.float64).clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    found = torch.tensor([evidence, written], dtype=torch.float64)
    features = torch.stack([yes.logit(), *found], dim=1)
    doubt = 1 / (len(truths) + 2)
    targets = torch.tensor([1 - doubt if truth else doubt for truth in truths], dtype=torch.float64)

    def loss(weights: Tensor) -> Tensor:  # the LLM's is a logarithm; the last is the bias
        logits = features @ torch.cat([weights[:1].exp(), weights[1:3]]) + weights[3]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)

    log_weight, *others = _minimised(loss, [0.0] * 4).tolist()
    names = ("spotting", "written", "bias")
    fitted = {name: round(weight, 4) for name, weight in zip(names, others, strict=True)}
    return Calibration(temperature=round(float(np.exp(-log_weight)), 4), **fitted)


def _minimised(loss: Callable[[Tensor], Tensor], start: Sequence[float]) -> Tensor:
    """Weights (K,) float64 at which `loss` of them is least, from `start` on."""
    weights = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimiser.zero_grad()
        value = loss(weights)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(step)  # type: ignore[no-untyped-call]
    return weights.detach()
