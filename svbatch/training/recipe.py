"""A recipe: what is trained on what, for how long. One YAML file, values only."""

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from svbatch.errors import TrainingError
from svbatch.training.checkpoints import Schedule

Mode = Literal["audio", "text", "both"]
Task = Literal["asr", "keyword_search", "speech_activity"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProjectorShape(_Part):
    width: int
    num_layers: int
    num_heads: int
    dropout: float


class AdapterShape(_Part):
    rank: int
    alpha: int
    targets: list[str]


class AlignStage(_Part):
    """CTC of the read-out; the LLM's layers are not run."""

    frames_per_batch: int
    schedule: Schedule


class LanguageStage(_Part):
    """Questions asked of the frozen LLM; trains what the schedule names: projector, or projector and adapter.

    questions: how many of each task are asked of a hearing on average. modes: shares of the hearings. mishearing:
    dropout of a projector that does not learn, so that speech it knows by heart is misread as new speech is.
    """

    tokens_per_batch: int
    ctc_weight: float
    mishearing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    questions: dict[Task, float]
    modes: dict[Mode, float]
    schedule: Schedule

    @model_validator(mode="after")
    def _only_what_does_not_learn_mishears(self) -> Self:
        if self.mishearing and "projector" in self.schedule.learning_rate:
            raise ValueError("a projector that learns does not mishear; leave out `mishearing`, or its learning rate")
        return self


class Recipe(_Part):
    name: str
    parts: str
    seed: int
    manifests: list[str]
    held_out_every: int
    frame_passes: int
    transcripts: int
    projector: ProjectorShape
    readout_tokens: int
    adapter: AdapterShape
    align: AlignStage
    asr: LanguageStage
    tasks: LanguageStage


def load_recipe(path: Path) -> Recipe:
    """The recipe in `path`. Raises TrainingError with every key that does not fit."""
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}; give the path of a recipe") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise TrainingError(f"{path}: {problems}") from error
