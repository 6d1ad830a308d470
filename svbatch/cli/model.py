"""svbatch bundle, export, train, evaluate, doctor: make, measure, export and inspect models."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from svbatch.bundle import Bundle
    from svbatch.training.answering import Mode

cache_option = click.option(
    "--cache", type=click.Path(path_type=Path), help="Where weights are kept (or SVBATCH_CACHE)."
)
name_argument = click.argument("name", default="mini")


@click.group()
def bundle() -> None:
    """Models: what they are made of, and whether it is all there.

    \b
    Example:  svbatch bundle list
              svbatch bundle fetch mini
    """


@bundle.command("list")
@cache_option
def list_bundles(cache: Path | None) -> None:
    """List the bundles that are installed with svbatch.

    \b
    Example:  svbatch bundle list
    """
    from svbatch.bundle import read_bundle, shipped_bundles

    for name in shipped_bundles():
        manifest = read_bundle(name, cache=cache).manifest
        click.echo(f"{name} {manifest.version}  {manifest.description}")


@bundle.command()
@name_argument
@cache_option
def show(name: str, cache: Path | None) -> None:
    """Show the parts, files, licences and figures of the bundle NAME (or a folder; default: mini).

    \b
    Example:  svbatch bundle show mini
    """
    from svbatch.bundle import read_bundle

    click.echo("\n".join(_shown(read_bundle(name, cache=cache))))


@bundle.command()
@name_argument
@cache_option
def check(name: str, cache: Path | None) -> None:
    """Read every file of the bundle NAME (or a folder; default: mini) and compare its hash with bundle.json.

    Exits 2 if one is missing or different, with a line for each.

    \b
    Example:  svbatch bundle check mini
    """
    from svbatch.bundle import read_bundle

    found = read_bundle(name, cache=cache)
    if problems := found.check():
        click.echo("\n".join(problems), err=True)
        sys.exit(2)
    num_files = len(found.manifest.files) + len(found.manifest.fetched)
    click.echo(f"all {num_files} files are what bundle.json says")


@bundle.command("fetch")
@name_argument
@click.option("--to", type=click.Path(path_type=Path), help="A folder that serves as --cache on another machine.")
@cache_option
def fetch_weights(name: str, to: Path | None, cache: Path | None) -> None:
    """Bring the weights of the bundle NAME (or a folder; default: mini) into the cache, or into a folder.

    \b
    Example:  svbatch bundle fetch mini
              svbatch bundle fetch mini --to weights/
    """
    from svbatch.bundle import find_bundle
    from svbatch.fetch import fetch

    found = find_bundle(name, cache=cache)
    fetch(found, to=to)
    click.echo(f"all {len(found.manifest.fetched)} files of bundle {name} are in {to or found.cache}")


@click.command()
@click.argument("model")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A folder for graph and weights.")
@click.option("--half", is_flag=True, help="Compute in float16: half the size; for GPUs.")
@click.option(
    "--voice-layer", type=int, help="Put the output of this layer, from 1, behind the last one's: for the voice."
)
def export(model: str, output: Path, half: bool, voice_layer: int | None) -> None:
    """Export the speech encoder of MODEL as OUTPUT/encoder.onnx, with its weights beside it.

    MODEL is a folder in transformers' format, or hf://OWNER/NAME: any Whisper, wav2vec 2.0, HuBERT,
    WavLM, w2v-BERT or Parakeet. The graph takes
    waveform (batch, samples) float32 at 16 kHz, up to 30 s, and lengths (batch) int64 in samples; it gives
    frames (batch, frames, width) float32, 50 a second (Parakeet: 12.5).

    \b
    Example:  svbatch export hf://microsoft/wavlm-base-plus --output encoders/wavlm
              svbatch export models/whisper-small --output encoders/whisper --half
    """
    from svbatch.speech.chosen_layers import ChosenLayers
    from svbatch.speech.export import write_encoder
    from svbatch.speech.pretrained import load_encoder_to_export

    encoder, normalise = load_encoder_to_export(model)
    chosen = ChosenLayers(voice=voice_layer)
    graph = write_encoder(encoder, output, half=half, normalise=normalise, chosen=chosen)
    width = encoder.config.hidden_size * (1 if voice_layer is None else 2)
    click.echo(f"{graph}: {width} wide, {'float16' if half else 'float32'}")


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="The folder with the recipe's manifests.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A folder for checkpoints and metrics; the bundle goes to its folder bundle/.",
)
@click.option("--parameters", is_flag=True, help="Only count what the recipe trains, by its sizes, without weights.")
@cache_option
def train(recipe: Path, data: Path | None, output: Path | None, parameters: bool, cache: Path | None) -> None:
    """Train projector and adapter by RECIPE, and write the bundle OUTPUT/bundle.

    Stopped at any moment and called again, it goes on from its last checkpoint. On several GPUs or machines:
    accelerate launch -m svbatch.training RECIPE with the same options.

    \b
    Example:  svbatch train jobs/train/mini.yaml --data speech/ --output out/train
              svbatch run job.yaml    # with `bundle: out/train/bundle` in it
              svbatch train jobs/train/speechverse_wavlm.yaml --parameters
    """
    from svbatch.training.recipe import load_recipe

    loaded = load_recipe(recipe)
    if parameters:
        from svbatch.training.shape import parameter_counts

        counts = parameter_counts(loaded)
        trained = sum(count for name, count in counts.items() if not name.startswith("frozen"))
        click.echo("\n".join(f"{name:15}{count:>14,}" for name, count in (*counts.items(), ("trained", trained))))
        return
    if data is None or output is None:
        raise click.UsageError("Missing option '--data' or '--output'.")
    from svbatch.training.card import sources
    from svbatch.training.data import read_manifests
    from svbatch.training.parts import frozen_parts
    from svbatch.training.publish import make

    trained_on = sources(read_manifests(data, loaded.manifests))  # a missing manifest is told before hours of work
    read_manifests(data, loaded.calibration)
    base = frozen_parts(loaded, recipe.parent, output / "parts", cache)
    facts = {
        "description": f"{loaded.name}: projector and adapter trained over the frozen parts of {base.manifest.name}",
        "data": [*(base.manifest.data if loaded.continues else []), *trained_on],
        "figures": {},
        "not_for": base.manifest.not_for,
    }
    made = make(loaded, base, data, output, facts)
    if made is not None:
        click.echo(f"bundle {made.id} in {made.folder}; `svbatch evaluate` measures it")


@click.command()
@click.argument("name", default="mini")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="A manifest of recordings with known answers."
)
@click.option("--output", type=click.Path(path_type=Path), help="A folder for answers, figures, report.md and a plot.")
@click.option("--list", "only_list", is_flag=True, help="Only show which tests the manifest allows, and how large.")
@click.option("--test", "names", multiple=True, help="Only this test; may be given again (default: all).")
@click.option(
    "--mode",
    "modes",
    multiple=True,
    metavar="MODE",
    type=click.Choice(["audio", "text", "both", "both-no-speech", "both-no-transcript", "joint", "generated"]),
    help="What the LLM is given and how it answers: audio, text, both, both-no-speech, both-no-transcript, joint or "
    "generated; may be given again (default: audio and both).",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many recordings of each test.")
@click.option("--wordings", is_flag=True, help="Ask the last mode in the wordings held out of training too.")
@click.option("--cascade", help="A bundle whose adapter the cascade's LLM has (default: none at all).")
@click.option("--classifiers", type=click.Path(path_type=Path), help="A manifest to train the frame classifiers on.")
@click.option(
    "--precision",
    default="auto",
    metavar="NAME",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="auto, float32 or bfloat16 (default: auto, bfloat16 where the processor multiplies it).",
)
@cache_option
def evaluate(
    name: str,
    data: Path,
    output: Path | None,
    only_list: bool,
    names: tuple[str, ...],
    modes: tuple["Mode", ...],
    limit: int | None,
    wordings: bool,
    cascade: str | None,
    classifiers: Path | None,
    precision: Literal["auto", "float32", "bfloat16"],
    cache: Path | None,
) -> None:
    """Measure the bundle NAME (or a folder; default: mini) on recordings with known answers, beside its own cascade.

    \b
    Example:  svbatch evaluate mini --data speech/dev.jsonl --list
              svbatch evaluate mini --data speech/dev.jsonl --output out/figures --limit 100
    """
    from svbatch.bundle import find_bundle
    from svbatch.fetch import fetch
    from svbatch.model import choose_precision, load_model
    from svbatch.training.benchmarks import table
    from svbatch.training.evaluate import CLASSIFIER_RECORDINGS, read_benchmarks
    from svbatch.training.evaluate import evaluate as measure
    from svbatch.training.results import tests_table

    tests = read_benchmarks(data, names=names, limit=limit)
    if only_list:
        click.echo(tests_table(table(tests)))
        return
    if output is None:
        raise click.UsageError("give --output DIR, a folder for the results, or --list")
    training = read_benchmarks(classifiers, limit=CLASSIFIER_RECORDINGS, written=False) if classifiers else []
    found = find_bundle(name, cache=cache)
    fetch(found)
    chosen = choose_precision(precision, "cpu")
    measure(
        tests,
        found,
        load_model(found, "cpu", chosen),
        output,
        precision=chosen,
        modes=modes or ("audio", "both"),
        wordings=wordings,
        cascade=cascade,
        training=training,
    )
    click.echo((output / "report.md").read_text(encoding="utf-8"), nl=False)


@click.command()
@cache_option
def doctor(cache: Path | None) -> None:
    """Say what works on this machine and what does not, and why; where caches and bundles are.

    \b
    Example:  svbatch doctor
    """
    from svbatch.doctor import diagnose

    marks = {True: "ok", False: "no", None: ""}
    for finding in diagnose(cache):
        click.echo(f"{marks[finding.works]:3}{finding.subject:18}{finding.detail}")


def _shown(found: "Bundle") -> Iterator[str]:
    manifest = found.manifest
    yield f"{manifest.name} {manifest.version}: {manifest.description}"
    yield f"id {found.id}, folder {found.folder}"
    yield "\nparts"
    for part in ("encoder", "voice_activity", "recogniser", "projector", "llm", "adapter"):
        said = getattr(manifest, part)
        yield f"  {part:16}{', '.join(f'{k} {v}' for k, v in _leaves(said.model_dump())) if said else 'none'}"
    for title, entries in (("files", manifest.files), ("fetched", manifest.fetched)):
        yield f"\n{title}"
        for name, entry in entries.items():
            size = f"{entry.size_bytes / 1e6:.1f} MB"
            yield f"  {name:26}{size:>9}  sha256 {entry.sha256[:12]}…  {entry.licence}"
            yield from (f"    from {address}" for address in getattr(entry, "addresses", ()))
    yield "\nfigures"
    yield from [f"  {name}: {value}" for name, value in _leaves(manifest.figures)] or ["  none"]
    yield "\ntrained on"
    sources = [", ".join(f"{k} {v}" for k, v in _leaves(source)) for source in manifest.data]
    yield from [f"  {source}" for source in sources] or ["  nothing"]
    yield f"\nnot for: {manifest.not_for or 'nothing is said'}"


def _leaves(tree: Mapping[str, Any], stem: str = "") -> Iterator[tuple[str, Any]]:
    """(`a.b`, value) for every value of nested mappings; null is left out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{stem}{key}.")
        elif value is not None:
            yield f"{stem}{key}", value
