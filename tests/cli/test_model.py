"""svbatch bundle, export, train and doctor as a user calls them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from click.testing import CliRunner, Result
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from svbatch.bundle import find_bundle, read_bundle
from svbatch.cli import main
from svbatch.errors import BundleError, TrainingError
from svbatch.onnx import OnnxSession

RECIPE = Path(__file__).parents[2] / "jobs" / "train" / "mini.yaml"
COMMANDS = (
    ["bundle"],
    ["bundle", "list"],
    ["bundle", "show"],
    ["bundle", "check"],
    ["bundle", "fetch"],
    ["export"],
    ["train"],
    ["evaluate"],
    ["doctor"],
)


def svbatch(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: object) -> str:
    """What the command prints; it must end with 0."""
    result = svbatch(*arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def own_copy(tiny_bundle, tmp_path) -> Path:
    """The tiny bundle's folder, to be damaged."""
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copy"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example_in_its_help(command):
    said = answer(*command, "--help")
    assert f"Example:  svbatch {command[0]}" in said


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_every_option_is_described(command):
    options = [line.split() for line in answer(*command, "--help").splitlines() if line.startswith("  --")]
    assert options
    assert all(len(words) > 2 for words in options)


def test_list_names_what_is_shipped():
    manifest = read_bundle("mini").manifest
    assert f"mini {manifest.version}  {manifest.description}\n" in answer("bundle", "list")


def test_show_tells_parts_hashes_licences_and_what_it_is_not_for(tiny_bundle):
    said = answer("bundle", "show", tiny_bundle.folder, "--cache", tiny_bundle.cache)
    lines = said.splitlines()
    assert lines[0] == "tiny 1: random weights for tests"
    assert lines[1] == f"id {tiny_bundle.id}, folder {tiny_bundle.folder}"
    assert "  recogniser      weights whisper.bin, tokenizer whisper-tokenizer.json" in lines
    entry = tiny_bundle.manifest.files["projector.onnx"]
    (line,) = [line for line in lines if line.startswith("  projector.onnx")]
    assert line.split()[-3:] == ["sha256", f"{entry.sha256[:12]}…", "Apache-2.0"]
    assert lines[-1] == "not for: anything but tests"


def test_show_tells_figures_by_name(own_copy):
    manifest = json.loads((own_copy / "bundle.json").read_text())
    manifest["figures"] = {"asr": {"word_error_rate": {"value": 5.5, "unit": "%"}}}
    manifest["data"] = [{"source": "LibriSpeech", "licence": "CC-BY-4.0"}]
    (own_copy / "bundle.json").write_text(json.dumps(manifest))
    said = answer("bundle", "show", own_copy)
    assert "  asr.word_error_rate.value: 5.5\n  asr.word_error_rate.unit: %\n" in said
    assert "\ntrained on\n  source LibriSpeech, licence CC-BY-4.0\n" in said


def test_check_says_that_all_files_are_right(tiny_bundle):
    said = answer("bundle", "check", tiny_bundle.folder, "--cache", tiny_bundle.cache)
    num_files = len(tiny_bundle.manifest.files) + len(tiny_bundle.manifest.fetched)
    assert said == f"all {num_files} files are what bundle.json says\n"


def test_check_names_every_damaged_file_and_exits_2(own_copy, tmp_path):
    for name in ("projector.onnx", "tokenizer.json"):
        content = bytearray((own_copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (own_copy / name).write_bytes(content)
    result = svbatch("bundle", "check", own_copy, "--cache", tmp_path / "empty")
    assert result.exit_code == 2
    assert result.stdout == ""
    named = sorted(line.split(":")[0] for line in result.stderr.splitlines())
    assert named == ["llm.gguf", "projector.onnx", "tokenizer.json", "whisper-tokenizer.json", "whisper.bin"]


def test_fetch_to_a_folder_makes_a_cache_for_another_machine(tiny_bundle, tmp_path):
    said = answer("bundle", "fetch", tiny_bundle.folder, "--to", tmp_path)
    assert said == f"all 3 files of bundle {tiny_bundle.folder} are in {tmp_path}\n"
    assert find_bundle(str(tiny_bundle.folder), cache=tmp_path).check() == []


def test_a_bundle_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    for command in ("show", "check", "fetch"):
        result = svbatch("bundle", command, tmp_path / "none")
        assert isinstance(result.exception, BundleError)
        assert "it ships: mini" in str(result.exception)


def test_export_writes_a_graph_that_runs_with_its_weights_beside_it(tmp_path):
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    HubertModel(config).save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "model")
    said = answer("export", tmp_path / "model", "--output", tmp_path / "graph", "--half", "--voice-layer", 1)
    assert said.splitlines()[-1] == f"{tmp_path / 'graph' / 'encoder.onnx'}: 32 wide, float16"
    session = OnnxSession(tmp_path / "graph" / "encoder.onnx", weights_dir=tmp_path / "graph")
    waveform = np.random.default_rng(0).standard_normal((1, 3_200)).astype(np.float32)
    frames = session.run({"waveform": waveform, "lengths": np.array([3_200])})["frames"]
    assert frames.shape == (1, 10, 32)
    assert np.abs(frames[0, :9]).sum(axis=1).all()


def test_export_refuses_a_folder_that_is_no_model(tmp_path):
    result = svbatch("export", tmp_path, "--output", tmp_path / "graph")
    assert isinstance(result.exception, BundleError)
    assert "no folder with a config.json" in str(result.exception)
    assert not (tmp_path / "graph").exists()


def test_train_writes_a_calibrated_bundle_that_checks(tiny_base, bursts, tmp_path):
    rows = []
    for number, text in enumerate(["the rain", "in the train", "an inn", "three men", None, None] * 8):
        soundfile.write(tmp_path / f"{number}.wav", bursts(1.0 + 0.02 * number, seed=number), 16_000)
        row = {"audio": f"{number}.wav", "text": text, "lang": "en", "speech": text is not None}
        rows.append(row | {"source": "made", "licence": "CC0-1.0"})
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    told = [row | {"source": "told", "sentiment": "neutral"} for row in rows if row["text"]]
    (tmp_path / "told.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in told))
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe |= {
        "calibration": ["told.jsonl"],
        "name": "taught",
        "parts": str(tiny_base.folder),
        "readout_tokens": 60,
        "held_out_every": 2,
    }
    recipe["projector"] = {"width": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
    recipe["adapter"] = {"rank": 2, "alpha": 4, "targets": ["q_proj"]}
    recipe |= {"manifests": ["train.jsonl"], "stages": recipe["stages"][:3]}
    for stage in recipe["stages"]:
        stage["schedule"]["steps"] = 1
    _, asr, tasks = recipe["stages"]
    tasks["modes"] = {"audio": 1.0}
    asr |= {"ctc_weight": 0.3, "mishearing": 0.0}
    asr["schedule"]["learning_rate"] = {"projector": 1e-4}
    asr["tokens_per_batch"] = tasks["tokens_per_batch"] = 200
    (tmp_path / "taught.yaml").write_text(yaml.safe_dump(recipe))
    options = ("--data", tmp_path, "--output", tmp_path / "out", "--cache", tiny_base.cache)
    said = answer("train", tmp_path / "taught.yaml", *options)
    made = find_bundle(str(tmp_path / "out" / "bundle"), cache=tiny_base.cache)
    assert said.splitlines()[-1].startswith(f"bundle {made.id} in {made.folder}")
    assert made.check() == []
    assert made.manifest.data == [{"source": "made", "licence": "CC0-1.0", "examples": 48}]
    assert made.manifest.calibration["speech_activity"].temperature > 0
    assert made.manifest.calibration["sentiment"].temperature > 0, "told alone has sentiments"


def test_train_refuses_missing_data_before_any_work(tiny_base, tmp_path):
    recipe = yaml.safe_load(RECIPE.read_text()) | {"parts": str(tiny_base.folder)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = svbatch("train", tmp_path / "recipe.yaml", "--data", tmp_path, "--output", tmp_path / "out")
    assert isinstance(result.exception, TrainingError)
    assert "train.jsonl: No such file or directory; give a folder that holds it with --data" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_doctor_tells_providers_cache_and_bundles(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "weights").write_bytes(b"x" * 2_500_000)
    lines = answer("doctor", "--cache", tmp_path).splitlines()
    findings = {line[3:21].strip(): (line[:2].strip(), line[21:]) for line in lines}
    assert findings["ONNX on cpu"][0] == "ok"
    assert findings["ONNX on cuda"][0] == "ok" or "wants CUDA 13 and cuDNN 9" in findings["ONNX on cuda"][1]
    assert findings["cache"] == ("", f"{tmp_path}: files 2.5 MB")
    assert "to fetch (`svbatch bundle fetch mini`)" in findings["bundle mini"][1]
    assert findings["torch"] == ("", torch.__version__)
    assert findings["choice"][1].startswith("a job with `device: auto` and `precision: auto` runs on c")


def test_doctor_says_when_there_is_no_place_for_a_cache(monkeypatch):
    for name in ("SVBATCH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    lines = answer("doctor").splitlines()
    (line,) = [line for line in lines if line[3:8] == "cache"]
    assert line.startswith("no ")
    assert "give --cache DIR, or set SVBATCH_CACHE" in line
