import json

import torch

from svbatch.model import load_encoder, load_recogniser
from svbatch.training.data import read_manifest
from svbatch.training.transcripts import recognised


def test_what_stands_whole_in_the_cache_is_not_asked_again(tiny_base, spoken, tmp_path):
    examples = read_manifest(spoken / "train.jsonl")[:4]
    encoder, recogniser = load_encoder(tiny_base, "cpu"), load_recogniser(tiny_base, torch.float32, "cpu")
    cache = tmp_path / "transcripts.jsonl"
    found = recognised(examples, range(4), encoder, recogniser, cache)
    assert sorted(found) == [0, 1, 2, 3]
    _, second, *_ = cache.read_text().splitlines(keepends=True)
    cache.write_text(json.dumps([examples[0].key, "as it was"]) + "\n" + second[:20])  # killed in the second line
    again = recognised(examples[:2], range(2), encoder, recogniser, cache)
    assert again == {0: "as it was", 1: found[1]}
    assert [json.loads(line)[0] for line in cache.read_text().splitlines()] == [e.key for e in examples[:2]]
    before = cache.read_bytes()
    assert recognised(examples[:2], range(2), encoder, recogniser, cache) == again
    assert cache.read_bytes() == before
