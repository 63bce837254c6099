"""`model_id` covers the weights: tokens of another training run are refused, by name."""

import copy

import pytest
import torch

import vtok_ext as vt
from vtok_ext.models._fingerprint import weights_fingerprint

FSQ = "vidtok_fsq_causal_488_262144"


@pytest.fixture
def model(fsq_model):
    return copy.deepcopy(fsq_model)


def test_same_weights_have_the_same_id(model, tmp_path):
    assert copy.deepcopy(model).model_id == model.model_id
    model.save_pretrained(tmp_path)
    assert vt.load_model(tmp_path).model_id == model.model_id
    expected = model.model_id
    assert model.to(torch.bfloat16).model_id == expected
    assert vt.load_model(tmp_path).to(torch.bfloat16).model_id == expected


@torch.no_grad()
def test_models_converted_to_float16_keep_their_id(model, clip):
    """float16 rounds otherwise than the fingerprint, which would name another training run."""
    half = copy.deepcopy(model).half()
    tokens = half.tokenize(clip(1, 5, 8, 8))
    assert half.model_id == model.model_id
    assert model.detokenize(tokens).shape == (1, 3, 5, 8, 8)
    assert copy.deepcopy(model).to("cpu", torch.float16).model_id == model.model_id
    half.encoder.conv_in.conv.weight.mul_(1.5)
    assert half.model_id != model.model_id


@pytest.mark.parametrize("how", ["step", "replacement", "load", "data"])
def test_other_weights_have_another_id(model, how):
    before = model.model_id
    assert model.model_id is not None and model.model_id == before
    weight = model.decoder.conv_out.conv.weight
    weight.grad = torch.ones_like(weight)
    if how == "step":
        torch.optim.SGD([weight], lr=0.01).step()
    elif how == "replacement":
        model.decoder.conv_out.conv.weight = torch.nn.Parameter(weight.detach() * 1.5)
    elif how == "load":
        model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    else:
        weight.data = weight.data * 1.5
    assert model.model_id != before
    assert model.model_id.partition("+")[0] == before.partition("+")[0]


def test_every_tensor_its_name_and_its_shape_count():
    weights = {"a": torch.arange(6.0), "b": torch.zeros(0), "c": torch.ones(5000)}
    expected = weights_fingerprint(weights)
    assert weights_fingerprint(dict(reversed(weights.items()))) == expected
    for changed in (
        {**weights, "a": torch.arange(6.0).flip(0)},
        {**weights, "a": torch.arange(6.0).view(2, 3)},
        {**weights, "b": torch.zeros(1)},
        {**weights, "c": torch.cat([torch.ones(4999), torch.zeros(1)])},
        {"a": weights["c"], "b": weights["b"], "c": weights["a"]},
    ):
        assert weights_fingerprint(changed) != expected


@torch.no_grad()
def test_tokens_of_another_run_are_refused(build, model, clip, tmp_path):
    tokens = model.tokenize(clip(1, 5, 8, 8))
    tokens.save(tmp_path / "tokens")
    tokens = vt.Tokens.load(tmp_path / "tokens")
    other = copy.deepcopy(model)
    other.encoder.conv_in.conv.weight.mul_(1.5)
    with pytest.raises(ValueError, match="another training run; any_weights=True accepts them"):
        other.detokenize(tokens)
    assert other.detokenize(tokens, any_weights=True).shape == (1, 3, 5, 8, 8)
    with pytest.raises(ValueError, match=r"detokenize: tokens must come from .*32768@.*, got .*2"):
        build("vidtok_fsq_causal_488_32768").detokenize(tokens, any_weights=True)


@torch.no_grad()
def test_latents_that_name_their_model_are_refused_elsewhere(kl_model, clip, tmp_path):
    encoding = kl_model.encode(clip(1, 5, 8, 8))
    assert encoding.model_id == ""
    encoding.model_id = kl_model.model_id
    encoding.save(tmp_path / "latent")
    loaded = vt.Encoding.load(tmp_path / "latent")
    assert torch.equal(kl_model.decode(loaded), kl_model.decode(encoding.latent))
    other = copy.deepcopy(kl_model)
    other.decoder.conv_in.conv.bias.add_(1)
    with pytest.raises(ValueError, match="decode: tokens must come from the weights of"):
        other.decode(loaded)


@torch.no_grad()
def test_stream_of_another_run_is_not_continued(model, clip):
    stream = model.stream_encoder()
    stream.push(clip(1, 5, 8, 8))
    other = copy.deepcopy(model)
    other.encoder.conv_in.conv.weight.mul_(1.5)
    with pytest.raises(ValueError, match="state must be that of encoder to latent of"):
        other.stream_encoder().load_state_dict(stream.state_dict())
