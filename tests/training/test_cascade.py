import json
from pathlib import Path

from svbatch.bundle import find_bundle
from svbatch.model import choose_precision, load_model
from svbatch.training.calibrate import calibrate_reader
from svbatch.training.cascade import load_cascade
from svbatch.training.data import read_manifest
from svbatch.training.recipe import load_recipe


def test_a_cascade_is_calibrated_on_what_the_bundle_hears_and_measured_so(tiny_bundle, spoken, tmp_path, trained):
    told = [
        json.dumps({"audio": f"{spoken}/{n}.wav", "sentiment": ["positive", "negative", "neutral"][n % 3]})
        for n in range(30)
    ]
    (tmp_path / "told.jsonl").write_text("\n".join(told))
    (tmp_path / "train.jsonl").write_text(
        (spoken / "train.jsonl").read_text().replace('"audio": "', f'"audio": "{spoken}/')
    )
    recipe = {
        "name": "reader",
        "parts": str(tiny_bundle.folder),
        "seed": 0,
        "manifests": ["train.jsonl"],
        "held_out_every": 5,
        "calibration": ["told.jsonl"],
        "frame_passes": 1,
        "transcripts": 10,
        "projector": {"width": 16, "num_layers": 0, "num_heads": 1, "dropout": 0.0},
        "readout_tokens": 60,
        "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj"]},
        "precision": "float32",
        "stages": [{"name": "words", "tokens_per_batch": 200, "questions": {"asr": 1.0}, "modes": {"text": 1.0},
                    "schedule": {"steps": 1, "warmup_steps": 1, "learning_rate": {"adapter": 1e-3}}}],
    }  # fmt: skip
    made = find_bundle(str(trained(recipe, tmp_path, tiny_bundle.cache) / "bundle"), cache=tiny_bundle.cache)
    precision = choose_precision("auto", "cpu")
    model = load_model(tiny_bundle, "cpu", precision)
    cascade, _ = load_cascade(tiny_bundle, str(made.folder), model, precision)
    assert made.manifest.calibration == calibrate_reader(read_manifest(tmp_path / "told.jsonl"), cascade)
    assert made.manifest.calibration.keys() == {"sentiment"}
    assert cascade.calibration == made.manifest.calibration
    assert cascade.habits is not model.habits


def test_what_is_taught_by_transcripts_alone_is_a_cascade_and_what_goes_on_from_ears_is_none():
    cascade = load_recipe(Path("jobs/train/mini_cascade.yaml"))
    [stage] = cascade.stages
    deaf = stage.model_copy(update={"modes": {"text": 1.0, "audio": 0.0}})
    assert cascade.hears_nothing
    assert cascade.model_copy(update={"stages": [deaf]}).hears_nothing
    assert not cascade.model_copy(update={"continues": ["projector", "adapter"]}).hears_nothing
    assert load_recipe(Path("jobs/train/mini_more_cascade.yaml")).hears_nothing
    assert not cascade.model_copy(update={"stages": []}).hears_nothing
    assert not load_recipe(Path("jobs/train/mini.yaml")).hears_nothing
