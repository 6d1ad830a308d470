"""The cascade that a user would build: faster-whisper tiny.en in int8, then the same LLM by llama.cpp on its text.

It runs in an environment of its own (bench/requirements.txt) and knows nothing of svbatch: bench/against_cascade.py
starts it. Each line on standard input is a JSON list of audio files; when all questions about all of them are answered
it prints the seconds that took. The transcript comes first in every prompt, so llama.cpp keeps what it has read of it
from one question to the next; a grammar holds closed answers to their labels, and lists to their form.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from faster_whisper import WhisperModel
from llama_cpp import Llama, LlamaGrammar

CONTEXT = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path, help="JSON: a list of {text, max_tokens, labels or schema}")
    parser.add_argument("--whisper", required=True, help="folder of a CTranslate2 Whisper")
    parser.add_argument("--llm", required=True, help="GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    whisper = WhisperModel(options.whisper, device="cpu", compute_type="int8", cpu_threads=options.threads)
    llm = Llama(options.llm, n_ctx=CONTEXT, n_threads=options.threads, n_threads_batch=options.threads, verbose=False)
    questions = json.loads(options.questions.read_text())
    grammars = [grammar_of(question) for question in questions]
    for line in sys.stdin:
        start = time.perf_counter()
        for path in json.loads(line):
            answer_all(path, questions, grammars, whisper, llm)
        print(time.perf_counter() - start, flush=True)


def grammar_of(question: dict) -> LlamaGrammar | None:
    if question.get("labels"):
        labels = " | ".join(json.dumps(label, ensure_ascii=False) for label in question["labels"])
        return LlamaGrammar.from_string(f"root ::= {labels}", verbose=False)
    if question.get("schema"):
        return LlamaGrammar.from_json_schema(json.dumps(question["schema"]), verbose=False)
    return None


def answer_all(
    path: str, questions: list[dict], grammars: list[LlamaGrammar | None], whisper: WhisperModel, llm: Llama
) -> list[str]:
    segments, _ = whisper.transcribe(path, language="en", beam_size=1)
    transcript = "".join(segment.text for segment in segments).strip()
    answers = [transcript]
    for question, grammar in zip(questions, grammars, strict=True):
        prompt = f"<|im_start|>user\nTranscript: {transcript}\n{question['text']}<|im_end|>\n<|im_start|>assistant\n"
        said = llm.create_completion(
            prompt, max_tokens=question["max_tokens"], temperature=0.0, grammar=grammar, stop=["<|im_end|>"]
        )
        answers.append(said["choices"][0]["text"])
    return answers


if __name__ == "__main__":
    main()
