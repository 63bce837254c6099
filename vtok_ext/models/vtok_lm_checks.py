"""What VTokLM asks of a language model, found out by running it on a few random embeddings.

    states   do not depend on later tokens
    logits   are those that `text_logits` computes of the states
    places   `position_ids` count from 0, as when nothing is said of them
    cache    with it a token has the state that it has in one pass

Architectures of transformers differ in all of it: BERT is causal as a decoder only, RoBERTa counts
positions from another number, Cohere, Granite and Gemma 2 change what their output layer says.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.models.vtok_control import ControlTokens

# Of the largest number: causal states differ by rounding, others by much more. Half types round in
# the third decimal place, and add up over layers.
_TOLERANCE, _TOLERANCE_HALF = 1e-4, 0.05
_LENGTH = 4
# What configurations call the factors of logits (a divisor in Granite).
_FACTORS, _DIVISOR = ("logit_scale", "lm_head_multiplier", "output_multiplier"), "logits_scaling"
_SOFT_CAP = "final_logit_softcapping"


def output_head(lm: Any) -> nn.Module:
    """Returns what makes logits of states: of most models the output layer alone, of BERT also what
    stands in front of it."""
    last = lm.get_output_embeddings()
    for child in lm.children():
        if child is not lm.base_model and any(part is last for part in child.modules()):
            return child
    return last


def scaled(
    logits: Tensor,  # [..., ids]
    config: Any,
) -> Tensor:
    """Returns the logits as the configuration scales and bounds them."""
    config = getattr(config, "text_config", config)
    for name in _FACTORS:
        factor = getattr(config, name, None)
        logits = logits if factor is None else logits * factor
    divisor, cap = getattr(config, _DIVISOR, None), getattr(config, _SOFT_CAP, None)
    logits = logits if divisor is None else logits / divisor
    return logits if cap is None else cap * torch.tanh(logits / cap)


def text_logits(
    lm: Any,
    states: Tensor,  # [..., H]
    control: ControlTokens | None = None,
) -> Tensor:
    """Returns the logits [..., ids] of a language model's last states, changed for control tokens
    if there is a change."""
    logits = output_head(lm)(states)
    return scaled(logits if control is None else control.logits(logits, states), lm.config)


def cache_name(model: nn.Module) -> str:
    """Returns what a base model calls its memory; renamed in transformers 5."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


@torch.no_grad()
def check_language_model(lm: Any) -> None:
    """Raises unless VTokLM can use a language model; see the module. Fake and meta tensors, which
    have no values, are not looked at.

    Raises:
        ValueError: a model that is not causal, or whose logits or positions are of another kind.
    """
    weight = lm.get_input_embeddings().weight
    if weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
        return
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        problem = _problem_of(lm, weight)
    except Exception as error:  # whatever a model says of arguments that it does not take
        raise ValueError(
            "VTokLM: lm must take inputs_embeds, attention_mask and position_ids and give a cache, "
            f"got {lm.config.model_type}: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    if problem:
        raise ValueError(f"VTokLM: lm must {problem}, got {lm.config.model_type}")


def _problem_of(lm: Any, weight: Tensor) -> str | None:
    """Returns what a language model must be and is not, None if there is nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, _LENGTH, weight.shape[1])
    # As large as words are; a table of zeros tells nothing.
    size = float(weight[:256].float().std().clamp(min=1e-3))
    inputs = (size * torch.randn(shape, generator=generator)).to(weight)
    attended = torch.ones(1, _LENGTH, dtype=torch.long, device=weight.device)
    options: dict[str, Any] = {"inputs_embeds": inputs, "attention_mask": attended}
    states = lm.base_model(**options).last_hidden_state
    other = inputs.clone()
    other[:, -1] = -other[:, -1]
    later = lm.base_model(inputs_embeds=other, attention_mask=attended).last_hidden_state
    if _differ(states[:, :-1], later[:, :-1]):
        return "be causal: its states must not depend on later tokens"
    if _differ(text_logits(lm, states), lm(**options).logits):
        return "have logits that its output layer says of its last states"
    if _differ(states, _continued(lm.base_model, inputs, attended)):
        return "count positions from 0, also where its cache goes on"
    return None


def _continued(model: Any, inputs: Tensor, attended: Tensor) -> Tensor:
    """Returns the states as answers and videos come about: the last token with the memory of those
    before it."""
    places = torch.arange(_LENGTH, device=inputs.device)[None]
    name, states = cache_name(model), []
    output: dict[str, Any] = {}
    for begin, end in ((0, _LENGTH - 1), (_LENGTH - 1, _LENGTH)):
        output = model(
            inputs_embeds=inputs[:, begin:end],
            attention_mask=attended[:, :end],
            position_ids=places[:, begin:end],
            use_cache=True,
            **({name: output[name]} if output else {}),
        )
        states.append(output["last_hidden_state"])
    return torch.cat(states, dim=1)


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    half = ours.dtype in (torch.float16, torch.bfloat16)
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    error = (ours.float() - theirs.float()).abs().max()
    return not bool(error <= tolerance * theirs.float().abs().max())
