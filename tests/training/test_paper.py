"""The paper's two models: their size, and the whole way from a recipe to rows with tiny random ones."""

import json
from pathlib import Path

import polars
import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from svbatch.bundle import find_bundle
from svbatch.cli import main
from svbatch.errors import TrainingError
from svbatch.model import load_model
from svbatch.training.parts import frozen_parts
from svbatch.training.recipe import load_recipe
from svbatch.training.shape import parameter_counts

RECIPES = Path(__file__).parents[2] / "jobs" / "train"


@pytest.mark.parametrize(
    ("name", "projector", "trained"),
    [("speechverse_wavlm", 18_886_656, 28_323_840), ("speechverse_bestrq", 17_313_816, 26_751_000)],
)
def test_the_papers_models_have_exactly_its_trainable_parameters(name, projector, trained):
    counts = parameter_counts(load_recipe(RECIPES / f"{name}.yaml"))
    assert counts["projector"] == projector
    assert counts["projector"] + counts["adapter"] == trained


def test_the_present_day_pairing_is_built_too_and_svbatch_train_shows_its_size():
    done = CliRunner().invoke(main, ["train", str(RECIPES / "speechverse_modern.yaml"), "--parameters"])
    assert done.exit_code == 0, done.output
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["projector", "34,378,754"],
        ["adapter", "17,432,576"],
        ["frozen", "encoder", "636,968,960"],
        ["frozen", "llm", "1,720,574,976"],
        ["trained", "51,811,330"],
    ]


def test_every_recipe_that_is_shipped_loads():
    assert {path.stem for path in RECIPES.rglob("*.yaml")} >= {"mini", "speechverse_wavlm", "speechverse_bestrq"}
    for path in RECIPES.rglob("*.yaml"):
        assert load_recipe(path).name == path.stem


def test_a_tiny_one_trains_is_bundled_and_answers_a_run(paper, corpus_dir, exporting, tmp_path):
    runner = CliRunner()
    out, cache = tmp_path / "train", tmp_path / "cache"
    options = ["--data", str(paper.data), "--output", str(out), "--cache", str(cache)]
    with exporting():
        done = runner.invoke(main, ["train", str(paper.recipe), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    learnt = [(line["stage"], line["step"]) for line in lines if "gradient_norm" in line]
    assert learnt == [("asr_projector", 10), ("tasks", 10)]
    bundle = find_bundle(str(out / "bundle"), cache=cache)
    assert bundle.manifest.readout == {}
    assert bundle.manifest.projector is not None
    weights = load_file(bundle.path("projector.safetensors"))
    recipe = load_recipe(paper.recipe)
    assert ("mix.weights" in weights) == (recipe.encoder.layers == "mix")
    assert [line["step"] for line in lines if "validation" in line] == ([5, 10] if recipe.stages[1].stop else [])
    assert load_model(bundle, "cpu", "float32").readout is None
    job = {"corpus": str(corpus_dir), "output": str(tmp_path / "answers"), "bundle": str(out / "bundle"),
           "tasks": [{"asr": {"via": "llm"}}, {"keyword_search": {"keywords": ["rain"]}}, "emotion", "slots"],
           "precision": "float32"}  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = runner.invoke(main, ["run", str(tmp_path / "job.yaml"), "--cache", str(cache)], catch_exceptions=False)
    assert done.exit_code in (0, 3), done.output  # an untrained LLM may break off an answer under a grammar
    asr = polars.read_parquet(tmp_path / "answers" / "asr" / "*.parquet")
    assert len(asr) == 4
    assert asr["words"].null_count() == len(asr)
    assert len(polars.read_parquet(tmp_path / "answers" / "emotion" / "*.parquet")) == 4


def test_parts_of_other_sizes_than_the_recipe_says_are_refused(paper_recipe, tmp_path):
    recipe = load_recipe(paper_recipe(tmp_path, "wavlm"))
    sizes = recipe.encoder.config | {"num_hidden_layers": 3}
    changed = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"config": sizes})})
    with pytest.raises(TrainingError, match=r"encoder.source .*: has num_hidden_layers 2, not 3; correct"):
        frozen_parts(changed, tmp_path, tmp_path / "parts", tmp_path / "cache")


def test_an_encoder_without_public_weights_is_asked_for(paper_recipe, tmp_path):
    recipe = load_recipe(paper_recipe(tmp_path, "bestrq"))
    changed = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"source": None})})
    with pytest.raises(TrainingError, match=r"encoder.source is null: it has no public weights; name a folder"):
        frozen_parts(changed, tmp_path, tmp_path / "parts", tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"parts": "mini"}, "name the frozen parts by `parts`, a bundle, or by `encoder` and `llm`"),
        ({"readout_tokens": 100}, "`readout_tokens` goes with our projector"),
        ({"adaptor": {}}, "adaptor: Extra inputs are not permitted"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(paper_recipe, tmp_path, changes, problem):
    with pytest.raises(TrainingError, match=problem):
        load_recipe(paper_recipe(tmp_path, "wavlm", **changes))


def test_strides_that_make_another_rate_are_refused(paper_recipe, tmp_path):
    recipe = load_recipe(paper_recipe(tmp_path, "bestrq", projector={"kind": "paper", "strides": [2, 2]}))
    with pytest.raises(TrainingError, match=r"strides \[2, 2\] make 25 frames a second 6.25; choose strides .* 12.5"):
        parameter_counts(recipe)
