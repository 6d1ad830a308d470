"""A bundle's model card in Markdown: what bundle.json says of how it was made, how good it is, what it is not for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from svbatch.bundle import FetchedEntry, Manifest
from svbatch.training.data import Example
from svbatch.training.markdown import markdown_table


def sources(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Source, licence, number of examples and hours of what was trained on; no hours where a manifest lacks some
    `duration`."""
    origins: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        origins.setdefault((example.source, example.licence), []).append(example)
    found = []
    for (source, licence), own in origins.items():
        said = [example.labels.get("duration") for example in own]
        seconds = [each for each in said if isinstance(each, int | float)]
        hours = {"hours": round(sum(seconds) / 3600, 2)} if len(seconds) == len(own) else {}
        found.append({"source": source, "licence": licence, "examples": len(own), **hours})
    return found


def card(manifest: Manifest) -> str:
    """The whole page; it follows from bundle.json alone."""
    recipe = manifest.recipe
    kept = recipe.get("held_out_every")
    parts = [
        f"# {manifest.name} {manifest.version}",
        manifest.description,
        f"Not for: {manifest.not_for or 'nothing is said.'}",
        "## Files",
        markdown_table(
            ["file", "MB", "licence", "from"], map(_file, [*manifest.files.items(), *manifest.fetched.items()])
        ),
        "## Trained on",
        markdown_table(
            ["source", "licence", "recordings", "hours"],
            ([row["source"], row["licence"], row["examples"], row.get("hours", "")] for row in manifest.data),
        ),
        *([f"One speaker in {kept} of them is kept aside, for choosing and calibrating."] if kept else []),
        "## Training",
        markdown_table(["stage", "steps", "learns"], map(_stage, recipe.get("stages", []))),
        *(f"{key.replace('_', ' ')}: {recipe[key]}" for key in ("continued_from", "history") if key in recipe),
        f"Probabilities are calibrated of: {', '.join(manifest.calibration) or 'nothing'}.",
        "## Figures",
        *_figures(manifest.figures),
    ]
    return "\n\n".join(parts) + "\n"


def _file(entry: tuple[str, Any]) -> Sequence[Any]:
    name, file = entry
    addresses = file.addresses if isinstance(file, FetchedEntry) else ["this folder"]
    return [name, f"{file.size_bytes / 1e6:.1f}", file.licence, ", ".join(addresses)]


def _stage(stage: Mapping[str, Any]) -> Sequence[Any]:
    schedule = stage["schedule"]
    return [stage["name"], schedule["steps"], ", ".join(schedule["learning_rate"])]


def _figures(figures: Mapping[str, Any]) -> Iterable[str]:
    tests = {name: figure for name, figure in figures.items() if isinstance(figure, Mapping)}
    if not tests:
        yield "None were measured."
        return
    systems = list(dict.fromkeys(key for test in tests.values() for key in test if isinstance(test[key], Mapping)))
    if notes := [f"- {name}: {said}" for name, said in figures.items() if name not in tests]:
        yield "\n".join(notes)
    rows = (
        [
            f"{name} (indicative)" if test.get("indicative") else name,
            test.get("metric", ""),
            test.get("recordings", ""),
            *(_figure(test[system]) if system in test else "" for system in systems),
        ]
        for name, test in tests.items()
    )
    yield markdown_table(["test", "metric", "recordings", *systems], rows)


def _figure(figure: Mapping[str, Any]) -> str:
    error, verdict = figure.get("calibration_error"), figure.get("verdict")
    said = f"{figure['value']} ({figure['low']} to {figure['high']})"
    return said + (f", ECE {error}" if error is not None else "") + (f", {verdict}" if verdict else "")
