import json
import subprocess
import sys
from pathlib import Path

import pytest

import svbatch.bundle
from svbatch.bundle import Bundle, describe_file, find_bundle, read_bundle, shipped_bundles, write_bundle
from svbatch.cache import cached_file
from svbatch.errors import BundleError

WEIGHTS = b"weights that others trained"
FILES = {
    "encoder.onnx": b"graph of the encoder",
    "projector.onnx": b"graph of the projector",
    "projector.safetensors": b"weights of the projector",
    "tokenizer.json": b"{}",
}


def fields(tmp_path: Path) -> dict:
    """All of a small bundle.json but `files`."""
    source = tmp_path / "weights"
    source.write_bytes(WEIGHTS)
    fetched = {**describe_file(source, "Apache-2.0").model_dump(), "from": [f"file:{source}"]}
    return {
        "name": "tiny",
        "version": "1",
        "description": "for tests",
        "encoder": {
            "graph": "encoder.onnx",
            "width": 8,
            "frames_per_second": 50,
            "window_seconds": 30,
            "external_data": None,
        },
        "recogniser": None,
        "projector": {"graph": "projector.onnx", "weights": "projector.safetensors", "config": {"kernel": 3}},
        "readout": {"scale": 1.5},
        "llm": {"weights": "llm.gguf", "tokenizer": "tokenizer.json"},
        "adapter": None,
        "calibration": {"keyword_search": {"temperature": 1.25}},
        "fetched": {"llm.gguf": fetched},
        "recipe": {"stages": ["align"]},
        "data": [{"name": "made up", "licence": "CC0"}],
        "figures": {"asr": {"wer": 0.055}},
        "not_for": "anything but tests",
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_bundle(folder, fields(tmp_path), dict.fromkeys(FILES, "MIT"))
    bundle = find_bundle("tiny", base=tmp_path, cache=tmp_path / "cache")
    cached = cached_file(bundle.cache, bundle.manifest.fetched["llm.gguf"].sha256, "llm.gguf")
    cached.parent.mkdir(parents=True)
    cached.write_bytes(WEIGHTS)
    return bundle


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_bundle_reads_back_as_it_was_written(bundle):
    written = json.loads((bundle.folder / "bundle.json").read_text())
    assert written["files"].keys() == FILES.keys()
    assert written["fetched"]["llm.gguf"]["size_bytes"] == len(WEIGHTS)
    assert bundle.manifest.model_dump(by_alias=True) == written
    assert bundle.manifest.projector.config == {"kernel": 3}
    assert read_bundle(bundle.ref).manifest == bundle.manifest


def test_files_are_found_in_the_folder_and_fetched_ones_in_the_cache(bundle):
    assert bundle.path("encoder.onnx") == bundle.folder / "encoder.onnx"
    assert bundle.path("llm.gguf").parent == bundle.cache / "files"
    assert bundle.path("llm.gguf").read_bytes() == WEIGHTS
    assert bundle.check() == []


def test_a_file_that_the_bundle_does_not_list_is_refused_with_those_it_does(bundle):
    with pytest.raises(BundleError, match=r"no file lm\.gguf; bundle\.json lists encoder\.onnx.*llm\.gguf"):
        bundle.path("lm.gguf")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_in_the_folder_is_refused_by_name_when_the_bundle_is_found(bundle, name):
    flip_a_byte(bundle.folder / name)
    with pytest.raises(BundleError, match=rf"{name}: sha256 is \w{{12}}…, expected \w{{12}}…; copy the bundle"):
        find_bundle(bundle.ref)


def test_a_flipped_byte_in_the_cache_is_found_by_check(bundle):
    path = bundle.path("llm.gguf")
    flip_a_byte(path)
    [problem] = bundle.check()
    assert problem.startswith("llm.gguf: sha256 is ")
    assert problem.endswith(f"; delete {path} and run `svbatch bundle fetch {bundle.ref}`")


def test_a_file_cut_short_in_the_cache_is_refused_by_name_when_it_is_used(bundle):
    path = bundle.path("llm.gguf")
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(BundleError, match=r"llm\.gguf: has 26 bytes, expected 27; delete"):
        bundle.path("llm.gguf")


def test_a_file_not_fetched_yet_names_the_command(bundle):
    bundle.path("llm.gguf").unlink()
    with pytest.raises(BundleError, match=r"llm\.gguf is missing; run `svbatch bundle fetch "):
        bundle.path("llm.gguf")


def test_every_damaged_file_is_named_at_once(bundle):
    flip_a_byte(bundle.folder / "encoder.onnx")
    (bundle.folder / "projector.onnx").unlink()
    with pytest.raises(BundleError, match=r"encoder\.onnx: sha256.*projector\.onnx: .* is missing"):
        find_bundle(bundle.ref)
    flip_a_byte(bundle.path("llm.gguf"))
    problems = read_bundle(bundle.ref, cache=bundle.cache).check()
    assert [problem.split(":")[0] for problem in problems] == ["encoder.onnx", "projector.onnx", "llm.gguf"]


def test_a_bundle_keeps_its_id_when_svbatch_learns_of_weights_that_it_does_not_have(bundle):
    """Else every recording would be asked anew: the id is that of before there were `voice` and `written`."""
    path = bundle.folder / "bundle.json"
    fitted = {"keyword_search": {"temperature": 2.75, "spotting": 0.33, "bias": 2.29}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": fitted}))
    assert read_bundle(bundle.ref).id == "ac200d98c1ae2df4"
    fitted["keyword_search"]["written"] = 2.8
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": fitted}))
    assert read_bundle(bundle.ref).id != "ac200d98c1ae2df4"


def test_the_id_changes_with_what_changes_an_answer_and_with_nothing_else(bundle):
    def id_with(change: dict) -> str:
        path = bundle.folder / "bundle.json"
        path.write_text(json.dumps({**bundle.manifest.model_dump(by_alias=True), **change}))
        return read_bundle(bundle.ref).id

    llm = bundle.manifest.fetched["llm.gguf"].model_dump(by_alias=True)
    assert len(bundle.id) == 16
    assert id_with({"figures": {}, "description": "other words", "not_for": "", "data": []}) == bundle.id
    assert id_with({"fetched": {"llm.gguf": {**llm, "from": ["hf:owner/repo/llm.gguf"]}}}) == bundle.id
    changed = [
        id_with({"fetched": {"llm.gguf": {**llm, "sha256": "0" * 64}}}),
        id_with({"readout": {"scale": 1.0}}),
        id_with({"calibration": {}}),
    ]
    assert len({bundle.id, *changed}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour: unknown key"),
        ({"llm": {"weights": "llm.gguf"}}, "llm.tokenizer: Field required"),
        ({"llm": {"weights": "lm.gguf", "tokenizer": "tokenizer.json"}}, r"lists lm\.gguf \(llm\)"),
        ({"calibration": {"asr": {"temperature": 0}}}, "calibration.asr.temperature: Input should be greater than 0"),
        (
            {"projector": {"graph": "../x", "weights": "y", "config": {}}},
            "projector.graph: String should match",
        ),
        ({"fetched": {"llm.gguf": {"sha256": "0" * 64, "size_bytes": 1, "licence": "", "from": []}}}, "from"),
        (
            {"fetched": {"llm.gguf": {"sha256": "0", "size_bytes": 1, "licence": "", "from": ["ftp://x/y"]}}},
            r"sha256: String should match.*from\.0: String should match",
        ),
    ],
)
def test_a_wrong_manifest_is_refused_with_every_key_that_is_wrong(bundle, change, message):
    path = bundle.folder / "bundle.json"
    path.write_text(json.dumps({**bundle.manifest.model_dump(by_alias=True), **change}))
    with pytest.raises(BundleError, match=message) as raised:
        find_bundle(bundle.ref)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_a_manifest_that_is_not_json_is_refused_with_its_line(bundle):
    (bundle.folder / "bundle.json").write_text('{\n "name": tiny}')
    with pytest.raises(BundleError, match=r"bundle\.json: Invalid JSON: .* at line 2 column"):
        find_bundle(bundle.ref)


def test_a_wrong_manifest_is_not_written(tmp_path):
    with pytest.raises(BundleError, match=r"bundle\.json: .*neither .* lists encoder\.onnx \(encoder\), projector"):
        write_bundle(tmp_path, fields(tmp_path), {})
    assert not (tmp_path / "bundle.json").exists()


def test_a_folder_without_a_manifest_says_what_a_bundle_is(tmp_path):
    with pytest.raises(BundleError, match=r"bundle\.json: cannot be read: No such file.*a bundle is a folder"):
        find_bundle(str(tmp_path))


def test_an_unknown_name_lists_the_shipped_ones(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(svbatch.bundle, "SHIPPED_DIR", tmp_path)
    assert shipped_bundles() == ["tiny"]
    with pytest.raises(BundleError, match=r"bundle tinny: svbatch ships no bundle .*\(it ships: tiny\)"):
        find_bundle("tinny")


def test_a_shipped_bundle_is_found_by_its_name_and_repaired_by_installing_again(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(svbatch.bundle, "SHIPPED_DIR", tmp_path)
    assert find_bundle("tiny").id == bundle.id
    flip_a_byte(bundle.folder / "encoder.onnx")
    with pytest.raises(BundleError, match=r"bundle tiny: encoder\.onnx: .*; install svbatch again"):
        find_bundle("tiny")


def test_reading_a_bundle_imports_no_torch():
    code = "import sys, svbatch.bundle, svbatch.fetch; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said == "False\n"
