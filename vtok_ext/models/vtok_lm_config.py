"""VTokLMConfig: the unified model's own numbers, and how its language model is built."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtok_ext.models._config import ModelConfig, closest
from vtok_ext.models._optional import require
from vtok_ext.models.vtok_heads import HEADS

# Of a language model that a few seconds on a CPU can train; `architecture` is its model_type in
# transformers. Names differ between architectures, which ignore those of others.
TINY = {
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_head": 4,
    "max_position_embeddings": 1024,
    "n_positions": 1024,
}


@dataclass(frozen=True)
class VTokLMConfig(ModelConfig):
    """Configuration of VTokLM.

    Attributes:
        lm_config: JSON of the language model's configuration in transformers.
        head: "flow" or "mse" for continuous tokens, "codes" for a discrete tokenizer.
        head_width, head_depth: of the head's network.
        lambda_vis, lambda_dec: weights of L_visLM and L_dec; a decoder of weight 0 is frozen, and
            so is a head that neither L_visLM nor, by predicted tokens, the decoder trains.
        predicted: part of the sequences whose decoder sees predicted tokens, reached linearly
            after `predicted_steps` steps.
        predicted_steps: see there.
        text_dropout: part of the videos from text that training gives no text, which makes
            guidance possible.
        lora_rank, lora_alpha, lora_targets: adapters of the language model; rank 0 for none.
        fps: frames per second of videos of which nothing else is said, None for 24 as in `VTok`: a
            model should answer and generate at the rate that it was trained on.
    """

    lm_config: str
    head: str = "flow"
    head_width: int = 128
    head_depth: int = 2
    lambda_vis: float = 1.0
    lambda_dec: float = 1.0
    predicted: float = 0.5
    predicted_steps: int = 1000
    text_dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    fps: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("head_width", "head_depth"):
            self._require_int(name, 1)
        for name in ("predicted_steps", "lora_rank", "lora_alpha"):
            self._require_int(name, 0)
        for name in ("lambda_vis", "lambda_dec", "predicted"):
            self._require_number(name, 0)
        self._require_number("text_dropout", 0)
        for name in ("predicted", "text_dropout"):
            if getattr(self, name) > 1:
                raise self._error(name, "at most 1")
        self._require_choice("head", HEADS)
        if self.fps is not None:
            self._require_number("fps", 0)
            if self.fps == 0:
                raise self._error("fps", "None or positive")
        try:
            kind = json.loads(self.lm_config)["model_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._error("lm_config", "JSON with model_type") from error
        if not isinstance(kind, str):
            raise self._error("lm_config", "JSON with model_type")

    def predicted_part(self, step: int) -> float:
        """Returns the part of the sequences whose decoder sees predictions after `step` steps."""
        if self.predicted_steps == 0:
            return self.predicted
        return self.predicted * min(1.0, step / self.predicted_steps)


def tiny_lm_config(
    vocabulary: int, architecture: str = "llama", sizes: Mapping[str, Any] | None = None
) -> str:
    """Returns the JSON of a small language model's configuration.

    Its initial weights have deviation 1 / sqrt(width), if the architecture lets one choose: the
    usual 0.02 suits widths of thousands, and narrow models with it hardly begin to learn.

    Args:
        vocabulary: number of ids.
        architecture: model_type in transformers, such as "llama" or "gpt2".
        sizes: fields of its configuration to change.

    Raises:
        ImportError: transformers is not installed, or not one for this torch.
        ValueError: an architecture that is no causal language model, an unknown field (the message
            names the closest), or values that it refuses.
    """
    transformers = require("tiny_lm_config", "transformers")
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if architecture not in names:
        raise ValueError(
            f"tiny_lm_config: architecture must be a causal language model of transformers, "
            f"got {architecture!r}{closest(architecture, names)}"
        )
    default = transformers.AutoConfig.for_model(architecture)
    known, attributes = default.to_dict(), getattr(default, "attribute_map", {})
    for name in sizes or {}:
        if name not in known and name not in attributes:
            raise ValueError(
                f"tiny_lm_config: sizes must be fields of {architecture}, "
                f"got {name!r}{closest(name, known)}"
            )
    tiny = {k: v for k, v in TINY.items() if k in known and k not in attributes}
    chosen = {**_as_decoder(default), **tiny, **(sizes or {}), "vocab_size": vocabulary}
    # Ids of a large vocabulary that are out of range here.
    unused = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = transformers.AutoConfig.for_model(architecture, **unused, **chosen)
    except Exception as error:  # transformers 5 has an exception of its own for each validator
        raise ValueError(
            f"tiny_lm_config: sizes must suit {architecture}, got {dict(sizes or {})}: {error}"
        ) from error
    width = getattr(config, "hidden_size", None)
    if "initializer_range" in known and "initializer_range" not in chosen and width:
        config.initializer_range = width**-0.5
    return config_json(config)


def _as_decoder(config: Any) -> dict[str, bool]:
    """Returns the field by which a model such as BERT becomes causal, if the configuration has it;
    else its tokens see later ones."""
    return {"is_decoder": True} if hasattr(config, "is_decoder") else {}


def load_lm(source: str) -> Any:
    """Returns the causal language model in folder `source` or of that hub id, in float32 as all
    else: transformers 5 loads weights in the dtype that they are stored in.

    Raises:
        ImportError: transformers is not installed, or not one for this torch.
    """
    transformers = require("load_lm", "transformers")
    config = transformers.AutoConfig.from_pretrained(source)
    for name, value in _as_decoder(config).items():
        setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_pretrained(source, config=config).float()


def config_json(config: Any) -> str:
    """Returns the JSON of a configuration of transformers."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def build_lm(text: str) -> nn.Module:
    """Returns a causal language model with random weights, of a `config_json`.

    Raises:
        ImportError: transformers is not installed, or not one for this torch.
    """
    transformers = require("build_lm", "transformers")
    fields = json.loads(text)
    kind = fields.pop("model_type")
    fields.pop("auto_map", None)  # names code in a repository: only transformers' own is run
    config = transformers.AutoConfig.for_model(kind, **fields)
    return transformers.AutoModelForCausalLM.from_config(config).float()


def add_lora(lm: nn.Module, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Adds adapters to the linear layers that `targets` name, and freezes everything else.

    Raises:
        ImportError: peft is not installed, or not one for this torch.
        ValueError: no layer has such a name.
    """
    peft = require("add_lora", "peft")
    lm.requires_grad_(False)
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    peft.inject_adapter_in_model(lora, lm)
