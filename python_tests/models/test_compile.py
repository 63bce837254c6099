"""torch.compile, traced by aot_eager: no C++ compilation, the same graph capture. With fullgraph
where torch can; older ones break the graph at our ops, and compute the same."""

import pytest
import torch
from helpers import needs_one_graph

# Operations are regrouped: values of order 3 differ by up to 6e-6.
TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}


NAMES = [
    "vidtok_fsq_causal_488_262144",
    "vidtok_kl_causal_488_4chn",
    "vidtok_kl_causal_488_4chn_v1_1",
    "vidtok_kl_noncausal_488_4chn",
]


@pytest.fixture(params=NAMES)
def shallow(request, build):
    """One change of resolution: every kind of layer, a third of the time to trace."""
    return build(request.param, ch_mult=(1, 2))


@needs_one_graph
def test_encode_and_decode_compile_without_a_break(shallow, clip):
    model = shallow
    video = clip(1, 5, 16, 16)
    with torch.no_grad():
        encoding = model.encode(video)
        expected = model.decode(encoding.latent)
        decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
        assert torch.allclose(decode(encoding.latent), expected, **TOLERANCE)
        encode = torch.compile(model.encode_chunk, fullgraph=True, backend="aot_eager")
        assert torch.allclose(encode(video), model.encode_chunk(video), **TOLERANCE)


@needs_one_graph
@torch.no_grad()
def test_decoding_of_ids_compiles(build):
    options = {"ch_mult": (1, 2), "regularizer": "vq", "codebook_size": 16}
    model = build("vidtok_kl_causal_488_4chn", **options)
    ids = torch.arange(8).view(1, 2, 2, 2)
    decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    assert torch.allclose(decode(ids), model.decode(ids), **TOLERANCE)


@needs_one_graph
@pytest.mark.parametrize("name", NAMES[1:3])
def test_stateful_chunk_compiles(build, name):
    kl_model = build(name, ch_mult=(1, 2))
    latent = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    step = torch.compile(kl_model.decode_chunk, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _, state = kl_model.decode_chunk(latent, None, True)
        expected, next_state = kl_model.decode_chunk(latent, state, True)
        frames, found = step(latent, state, True)
    assert torch.allclose(frames, expected, **TOLERANCE)
    assert found.keys() == next_state.keys()
    assert all(torch.allclose(found[k], next_state[k], **TOLERANCE) for k in found)


@pytest.mark.parametrize("fullgraph", [pytest.param(True, marks=needs_one_graph), False])
def test_training_step_compiles(build, clip, fullgraph):
    model = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2)).train()
    video = clip(1, 5, 16, 16)
    step = torch.compile(
        lambda x: model(x, sample=False).reconstruction.square().mean(),
        fullgraph=fullgraph,
        backend="aot_eager",
    )
    loss = step(video)
    loss.backward()
    assert torch.allclose(
        loss, model(video, sample=False).reconstruction.square().mean(), **TOLERANCE
    )
    assert all(p.grad is not None for p in model.parameters())
