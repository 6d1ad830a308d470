"""A recipe: what is trained on what, for how long. One YAML file, values only."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from svbatch.errors import TrainingError
from svbatch.training.checkpoints import Schedule, Stopping

Mode = Literal["audio", "text", "both"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EncoderChoice(_Part):
    """A frozen encoder in transformers' format. source: a folder relative to the recipe, or hf://OWNER/NAME; null where
    there are no public weights. layers: the last alone, or a learned mix of all. config: its sizes, as its config.json
    has them; what is found at `source` must agree."""

    source: str | None
    licence: str
    layers: Literal["last", "mix"] = "last"
    config: dict[str, Any]


class LanguageModelChoice(_Part):
    """A frozen LLM in transformers' format; the keys are those of an encoder."""

    source: str
    licence: str
    config: dict[str, Any]


class ProjectorShape(_Part):
    """Ours: convolutions, transformer layers and the read-out. `num_layers` counts transformer layers. tone: tasks of
    the library whose labels are read from the voice and given to the LLM as words. voice_layer: the encoder's layer,
    from 1, that they are read from; null for what the projector reads."""

    width: PositiveInt
    num_layers: int
    num_heads: int
    dropout: float
    strides: list[PositiveInt] = [2, 2]
    tone: list[str] = []
    voice_layer: PositiveInt | None = None


class PaperShape(_Part):
    """The paper's: convolutions of the LLM's width, and no read-out."""

    kind: Literal["paper"]
    strides: list[PositiveInt]


def _shape_of(value: Any) -> str:
    keys = value if isinstance(value, dict) else vars(value)
    return "paper" if "kind" in keys else "ours"


class AdapterShape(_Part):
    rank: int
    alpha: int
    targets: list[str]


class AlignStage(_Part):
    """CTC of the read-out; the LLM's layers are not run."""

    name: str
    frames_per_batch: PositiveInt
    corpora: dict[str, NonNegativeFloat] = {}
    micro_batches: PositiveInt = 1
    stop: Stopping | None = None
    schedule: Schedule


class ToneStage(_Part):
    """Labels of the voice, for the head that the projector's `tone` names; the LLM's layers are not run."""

    name: str
    hearings_per_batch: PositiveInt
    micro_batches: PositiveInt = 1
    stop: Stopping | None = None
    schedule: Schedule


class LanguageStage(_Part):
    """Questions asked of the frozen LLM; trains what the schedule names: projector, adapter, or both.

    questions: how many of each task are asked of a hearing on average. modes: shares of the hearings. corpora: weights
    of the manifests' sources, 1 where none is given. micro_batches: so many batches make a step. mishearing: dropout
    of a projector that does not learn, so that speech it knows by heart is misread as new speech is.
    """

    name: str
    tokens_per_batch: PositiveInt
    ctc_weight: float = 0.0
    mishearing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    questions: dict[str, NonNegativeFloat]
    modes: dict[Mode, NonNegativeFloat] = {"audio": 1.0}
    corpora: dict[str, NonNegativeFloat] = {}
    micro_batches: PositiveInt = 1
    stop: Stopping | None = None
    schedule: Schedule

    @model_validator(mode="after")
    def _only_what_does_not_learn_mishears(self) -> Self:
        if self.mishearing and "projector" in self.schedule.learning_rate:
            raise ValueError("a projector that learns does not mishear; leave out `mishearing`, or its learning rate")
        return self


def _kind_of(value: Any) -> str:
    keys = value if isinstance(value, dict) else vars(value)
    if "hearings_per_batch" in keys:
        return "tone"
    return "align" if "frames_per_batch" in keys else "ask"


class Recipe(_Part):
    """`parts` names a bundle whose frozen parts are used; or `encoder` and `llm` name them one by one. `continues`:
    what begins as that bundle's own. `calibration`: manifests that nothing is learnt from, for calibrating what is told
    by words."""

    name: str
    parts: str | None = None
    continues: list[Literal["projector", "adapter"]] = []
    encoder: EncoderChoice | None = None
    llm: LanguageModelChoice | None = None
    seed: int
    manifests: list[str]
    held_out_every: PositiveInt
    calibration: list[str] = []
    frame_passes: PositiveInt
    cache_gigabytes: PositiveFloat | None = None
    transcripts: int = 0
    projector: Annotated[
        Annotated[ProjectorShape, Tag("ours")] | Annotated[PaperShape, Tag("paper")], Discriminator(_shape_of)
    ]
    readout_tokens: int = 0
    adapter: AdapterShape
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    stages: list[
        Annotated[
            Annotated[AlignStage, Tag("align")]
            | Annotated[ToneStage, Tag("tone")]
            | Annotated[LanguageStage, Tag("ask")],
            Discriminator(_kind_of),
        ]
    ]

    @property
    def has_readout(self) -> bool:
        """Whether the projector's embeddings can be read as tokens."""
        return isinstance(self.projector, ProjectorShape)

    @property
    def hears_nothing(self) -> bool:
        """Whether its stages have transcripts alone, as a cascade's have; an adapter that goes on may have heard."""
        asking = [stage for stage in self.stages if isinstance(stage, LanguageStage)]
        modes = {mode for stage in asking for mode, share in stage.modes.items() if share}
        return "projector" not in self.continues and len(asking) == len(self.stages) and modes == {"text"}

    @property
    def voice_layer(self) -> int | None:
        """The encoder's layer that the tone is read from, if it is one of its own."""
        return self.projector.voice_layer if isinstance(self.projector, ProjectorShape) else None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.parts is None) == (self.encoder is None) or (self.encoder is None) != (self.llm is None):
            raise ValueError("name the frozen parts by `parts`, a bundle, or by `encoder` and `llm`")
        if self.continues and self.parts is None:
            raise ValueError("`continues` goes on from the bundle that `parts` names; name one")
        if self.has_readout != (self.readout_tokens > 0):
            raise ValueError("`readout_tokens` goes with our projector, which has a read-out; the paper's has none")
        if not self.has_readout and any(
            isinstance(stage, AlignStage) or (isinstance(stage, LanguageStage) and stage.ctc_weight)
            for stage in self.stages
        ):
            raise ValueError("the paper's projector has no read-out: leave out the align stage and `ctc_weight`")
        reads_tone = isinstance(self.projector, ProjectorShape) and bool(self.projector.tone)
        if not reads_tone and any(isinstance(stage, ToneStage) for stage in self.stages):
            raise ValueError("a tone stage wants `projector.tone`: the tasks whose labels are read from the voice")
        if self.voice_layer and not reads_tone:
            raise ValueError("`projector.voice_layer` is for `projector.tone`, which is not there; leave it out")
        learns_tone = "projector" in self.continues or any(isinstance(stage, ToneStage) for stage in self.stages)
        if reads_tone and not learns_tone:
            raise ValueError("`projector.tone` is learnt by a tone stage alone; add one (`hearings_per_batch`)")
        if twice := [name for name, count in Counter(stage.name for stage in self.stages).items() if count > 1]:
            raise ValueError(f"two stages are called {twice[0]}; each has its own checkpoint, so name them apart")
        return self


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
