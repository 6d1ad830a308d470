"""svbatch beside the cascade of bench/cascade.py: the same recordings and questions, by turns on the same cores.

    python bench/against_cascade.py bench/every_task.yaml --python CASCADE_ENV/bin/python --whisper DIR \
        --llm FILE.gguf [--corpus DIR] [--recordings N] [--pairs N] [--precision float32]

Models are loaded before the clock starts, on both sides; neither writes a table. The medians' ratio is printed.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from svbatch.annotate import annotate
from svbatch.bundle import find_bundle
from svbatch.corpus.recording import Recording
from svbatch.corpus.sources import iter_recordings
from svbatch.fetch import fetch
from svbatch.generate import MAX_TOKENS
from svbatch.job import load_job
from svbatch.model import Model, choose_precision, load_model
from svbatch.tasks.task import Task

MAX_LABEL_TOKENS = 24


def questions_of(task: Task) -> list[dict[str, Any]]:
    """A task's questions as the cascade asks them."""
    limit = MAX_LABEL_TOKENS if task.is_closed else task.max_tokens or MAX_TOKENS
    shape = {"labels": list(task.scored)} if task.is_closed else {"schema": schema_of(task)}
    return [{"text": question, "max_tokens": limit, **shape} for question in task.questions()]


def schema_of(task: Task) -> dict[str, Any] | None:
    """Lists as JSON with the task's limits; None for free text."""
    text = {"type": "string", "maxLength": task.limits.max_chars}
    if task.answer == "items":
        return {"type": "array", "items": text, "maxItems": task.limits.max_items}
    if task.answer == "pairs":
        slot = {"type": "string", "enum": [label.name for label in task.labels]}
        pair = {"type": "object", "properties": {"slot": slot, "value": text}, "required": ["slot", "value"]}
        return {"type": "array", "items": pair, "maxItems": task.limits.max_items}
    return None


def seconds_of_svbatch(recordings: Sequence[Recording], tasks: Sequence[Task], model: Model) -> float:
    start = time.perf_counter()
    annotate(recordings, tasks, {task.name: "bench" for task in tasks}, model, "bench")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--python", required=True, help="of the environment of bench/requirements.txt")
    parser.add_argument("--whisper", required=True)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--corpus", action="append", default=[])
    parser.add_argument("--recordings", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    options = parser.parse_args()
    job = load_job(options.job, corpus=options.corpus)
    bundle = find_bundle(job.bundle, cache=None)
    fetch(bundle)
    precision = choose_precision(options.precision, "cpu")
    model = load_model(bundle, "cpu", precision)
    recordings = list(iter_recordings(job.corpus, job.corpus_base))[: options.recordings]
    paths = json.dumps([str(recording.location.path) for recording in recordings]) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.json"
        asked = [question for task in job.tasks if task.name != "asr" for question in questions_of(task)]
        questions.write_text(json.dumps(asked))
        script = Path(__file__).with_name("cascade.py")
        command = [options.python, str(script), str(questions), "--whisper", options.whisper, "--llm", options.llm]
        command += ["--threads", str(torch.get_num_threads())]
        times: dict[str, list[float]] = {"svbatch": [], "cascade": []}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cascade:
            assert cascade.stdin is not None
            assert cascade.stdout is not None
            for _ in range(options.pairs):
                times["svbatch"].append(seconds_of_svbatch(recordings, job.tasks, model))
                cascade.stdin.write(paths)
                cascade.stdin.flush()
                times["cascade"].append(float(cascade.stdout.readline()))
            cascade.stdin.close()
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(f"{len(recordings)} recordings, {len(job.tasks)} tasks, {precision}, medians of {options.pairs}")
    print(f"the cascade takes {medians['cascade'] / medians['svbatch']:.1f} times as long as svbatch")


if __name__ == "__main__":
    main()
