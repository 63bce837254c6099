"""VToks of a few thousand parameters and what to say to them, for several test files."""

import torch

import vtok_ext as vt
from vtok_ext.data.captioned.questions import vocabulary
from vtok_ext.models import VTok
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.models.vtok_lm_config import VTokLMConfig, tiny_lm_config
from vtok_ext.models.vtok_sequence import GENERATION, UNDERSTANDING, Turn
from vtok_ext.models.vtok_text import WordTokenizer

ASK = Turn(UNDERSTANDING, "what colour is the circle", "red")
MAKE = Turn(GENERATION, "a red circle moves left")

TINY = {
    "image_size": 16,
    "encoder_patch": 4,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "token_dim": 12,
    "num_queries": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "decoder_patch": (2, 4, 4),
    "sampling_steps": 2,
}

SIZES = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(**overrides) -> VTok:
    torch.manual_seed(0)
    return vt.create_model("vtok_small", **{**TINY, **overrides}).eval()


def tiny_fsq(**overrides) -> VTok:
    return tiny(levels=(4, 4, 4), **overrides)


def tiny_lm(tokenizer: VTok | None = None, architecture: str = "llama", **overrides) -> VTokLM:
    """A unified model; overrides are those of VTokLMConfig, and `sizes` of the language model."""
    tokenizer = tiny(stride=2) if tokenizer is None else tokenizer
    text = WordTokenizer(vocabulary())
    torch.manual_seed(1)
    head = "codes" if tokenizer.is_discrete else "flow"
    fields = {"head": head, "head_width": 16, "head_depth": 1, **overrides}
    config = VTokLMConfig(tiny_lm_config(len(text), architecture, SIZES[architecture]), **fields)
    return VTokLM(config, tokenizer, text).eval()
