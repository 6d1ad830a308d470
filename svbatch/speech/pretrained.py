"""Published speech encoders in transformers' format, from a local folder or by transformers' own download."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel

from svbatch.errors import BundleError
from svbatch.speech.waveform import encoder_of, kind_of

HUB = "hf://"
TRAINING_ONLY = {"masked_spec_embed"}  # stands for what training hides; no published CTC model needs it


def load_encoder_to_export(source: str) -> tuple[PreTrainedModel, bool]:
    """The encoder of `source` in float32, and whether it wants each waveform at mean 0 and variance 1.

    `source` is a folder in transformers' format, or hf://OWNER/NAME, which transformers downloads into its
    own cache. Raises BundleError if it cannot be had, is of another kind or does not hold all its weights.
    """
    name = source.removeprefix(HUB)
    if name == source and not Path(name, "config.json").is_file():
        raise BundleError(
            f"{source}: no folder with a config.json; give a model's folder in transformers' format, or {HUB}OWNER/NAME"
        )
    kinds: Any = AutoModel
    try:
        with torch.device("meta"):  # its kind shows before its weights are read
            encoder_of(kinds.from_config(AutoConfig.from_pretrained(name)))
        model, report = kinds.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        encoder = encoder_of(model)
        extractor: Any = AutoFeatureExtractor
        normalise = kind_of(encoder) == "convolutional" and extractor.from_pretrained(name).do_normalize
    except (OSError, ValueError) as error:  # what transformers raises for a file it lacks or cannot read
        raise BundleError(f"{source}: transformers cannot load it: {' '.join(str(error).split())}") from error
    stem = next(f"{path}." if path else "" for path, module in model.named_modules() if module is encoder)
    held = {f"{stem}{key}" for key in encoder.state_dict()}
    if missing := sorted((held & set(report["missing_keys"])) - TRAINING_ONLY):
        raise BundleError(f"{source}: lacks {len(missing)} weights ({missing[0]} …); get the model again")
    return encoder, normalise
