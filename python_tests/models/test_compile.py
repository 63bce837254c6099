"""torch.compile with fullgraph, traced by aot_eager: no C++ compilation, the same graph capture."""

import torch


def test_encode_and_decode_compile_without_a_break(model, clip):
    video = clip(1, 5, 16, 16)
    with torch.no_grad():
        encoding = model.encode(video)
        expected = model.decode(encoding.latent)
        decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
        assert torch.allclose(decode(encoding.latent), expected, atol=1e-5)
        encode = torch.compile(model.encode_chunk, fullgraph=True, backend="aot_eager")
        assert torch.allclose(encode(video), model.encode_chunk(video), atol=1e-5)


def test_stateful_chunk_compiles(kl_model):
    latent = torch.randn(1, 4, 2, 2, 2)
    step = torch.compile(kl_model.decode_chunk, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _, state = kl_model.decode_chunk(latent, None, True)
        expected, next_state = kl_model.decode_chunk(latent, state, True)
        frames, found = step(latent, state, True)
    assert torch.allclose(frames, expected, atol=1e-5)
    assert found.keys() == next_state.keys()
    assert all(torch.allclose(found[k], next_state[k], atol=1e-5) for k in found)


def test_training_step_compiles(build, clip):
    model = build("vidtok_kl_causal_488_4chn").train()
    video = clip(1, 5, 16, 16)
    step = torch.compile(
        lambda x: model(x, sample=False).reconstruction.square().mean(),
        fullgraph=True,
        backend="aot_eager",
    )
    loss = step(video)
    loss.backward()
    assert torch.allclose(loss, model(video, sample=False).reconstruction.square().mean())
    assert all(p.grad is not None for p in model.parameters())
