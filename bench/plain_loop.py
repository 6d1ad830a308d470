"""svbatch beside what a user would write first: a loop over recordings and tasks, each question asked from the start.

    python bench/plain_loop.py bench/every_task.yaml [--corpus DIR] [--recordings N] [--pairs N] [--precision float32]

For every segment and task the loop runs the encoder and the projector on the same window, and transformers' `generate`
with the same weights at the same precision, one prompt at a time; closed answers are written out, not scored. The spans
it asks about are those that svbatch asks about, found before the clock starts; neither side writes a table. They run by
turns; the medians' ratio is printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from svbatch.annotate import annotate, detector_of
from svbatch.ask import mode_of
from svbatch.bundle import find_bundle
from svbatch.corpus.decode import decode
from svbatch.corpus.recording import Recording
from svbatch.corpus.segment import Segment, speech_segments, windows
from svbatch.corpus.sources import iter_recordings
from svbatch.fetch import fetch
from svbatch.hear import Span, hear
from svbatch.job import load_job
from svbatch.model import Model, choose_precision, load_model
from svbatch.tasks import prompts
from svbatch.tasks.task import Task

MAX_NEW_TOKENS = {"label": 12, "yes_no": 4}


Spans = dict[str, list[Segment]]  # by the scope of the tasks that are asked of them


def asked_spans(recording: Recording, model: Model) -> Spans:
    """The windows of a recording, and its segments that hold speech."""
    waveform = decode(recording).waveform
    segments = speech_segments(waveform, detector_of(model))
    spans = [Span(waveform[s.start : s.end], s.start_s, transcribed=True) for s in segments]
    heard = hear(spans, model) if spans else []
    spoken = [segment for segment, hearing in zip(segments, heard, strict=True) if hearing.has_speech]
    return {"segment": spoken, "window": windows(waveform.size, segments)}


def plain_loop(
    recordings: Sequence[Recording], spans: Sequence[Spans], tasks: Sequence[Task], model: Model
) -> list[str]:
    """Every answer as text. The LLM's attention is transformers' own."""
    answers = []
    for recording, own in zip(recordings, spans, strict=True):
        waveform = decode(recording).waveform
        for task in tasks:
            for segment in own[task.scope]:
                for question in task.questions():
                    span = Span(waveform[segment.start : segment.end], 0.0, mode_of(task) != "audio")
                    answers.append(ask_once(span, task, question, model))
    return answers


def ask_once(span: Span, task: Task, question: str, model: Model) -> str:
    """One question, from the waveform on."""
    [heard] = hear([span], model)
    if task.name == "asr" and heard.transcript:
        return heard.transcript.text
    llm = model.llm
    parts = [llm.embed(torch.tensor(prompts.opening_ids(model.tokenizer))), heard.speech.to(llm.dtype)]
    if span.transcribed:
        parts.append(llm.embed(torch.tensor(prompts.transcript_ids(model.tokenizer, heard.text))))
    parts.append(llm.embed(torch.tensor(prompts.question_ids(model.tokenizer, question))))
    embeddings = torch.cat(parts)[None]
    said = llm.model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS.get(task.answer, task.max_tokens or 400),
        eos_token_id=prompts.end_id(model.tokenizer),
        pad_token_id=prompts.end_id(model.tokenizer),
    )
    return prompts.answer_text(model.tokenizer, said[0].tolist())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--corpus", action="append", default=[])
    parser.add_argument("--recordings", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    options = parser.parse_args()
    job = load_job(options.job, corpus=options.corpus)
    bundle = find_bundle(job.bundle, cache=None)
    fetch(bundle)
    precision = choose_precision(options.precision, "cpu")
    ours, theirs = (load_model(bundle, "cpu", precision) for _ in range(2))
    theirs.llm.model.set_attn_implementation("sdpa")
    recordings = list(iter_recordings(job.corpus, job.corpus_base))[: options.recordings]
    versions = {task.name: "bench" for task in job.tasks}
    with torch.inference_mode():
        spans = [asked_spans(recording, ours) for recording in recordings]
    times: dict[str, list[float]] = {"svbatch": [], "loop": []}
    for _ in range(options.pairs):
        times["svbatch"].append(seconds(lambda: annotate(recordings, job.tasks, versions, ours, "bench")))
        times["loop"].append(seconds(lambda: plain_loop(recordings, spans, job.tasks, theirs)))
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(f"{len(recordings)} recordings, {len(job.tasks)} tasks, {precision}, medians of {options.pairs}")
    print(f"the loop takes {medians['loop'] / medians['svbatch']:.1f} times as long as svbatch")


if __name__ == "__main__":
    main()
