"""GPT: causality, cached sampling equals the whole network, the chain rule, and learning."""

import math

import pytest
import torch

import vtok_ext as vt
from vtok_ext.models import GPT, GPTConfig
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.generator import LatentOrigin
from vtok_ext.models.gpt import balanced_factors

SMALL = {"codebook_size": 12, "grid": (2, 2, 3), "hidden_size": 16, "depth": 2, "num_heads": 2}
SPLIT = {**SMALL, "factors": (4, 3)}


def small(seed=0, **config):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**config)).eval()
    with torch.no_grad():  # larger than at the start, so that everything is visible
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


def random_ids(batch=3, seed=0, codes=12):
    return torch.randint(codes, (batch, 2, 2, 3), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_tokens_see_only_what_is_before_them(config):
    model, ids = small(**config), random_ids()
    with torch.no_grad():
        logits = model(ids)
        for n in range(12):
            changed = ids.flatten(1).clone()
            changed[:, n] = (changed[:, n] + 1) % 12
            other = model(changed.view_as(ids))
            for k, (a, b) in enumerate(zip(logits, other, strict=True)):
                assert torch.allclose(a[:, :n], b[:, :n], atol=1e-5)
                # The first digit of a token does not see that token, the second may see the first.
                assert k > 0 or torch.allclose(a[:, n], b[:, n], atol=1e-5)
                assert n == 11 or not torch.allclose(a[:, n + 1 :], b[:, n + 1 :], atol=1e-3)


@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_probabilities_of_all_ids_of_a_place_sum_to_one(config):
    model, ids = small(**config), random_ids(1)
    place = 5
    total = 0.0
    with torch.no_grad():
        for code in range(12):
            changed = ids.flatten(1).clone()
            changed[:, place] = code
            digits = model.split(changed)
            logits = model(changed.view_as(ids))
            total += math.exp(
                sum(
                    float(logit[0, place].log_softmax(-1)[digit[0, place]])
                    for logit, digit in zip(logits, digits, strict=True)
                )
            )
    assert total == pytest.approx(1, abs=1e-5)


def test_digits_are_a_bijection():
    model = small(**SPLIT)
    ids = torch.arange(12)
    digits = model.split(ids)
    assert (
        torch.equal(model.join(digits), ids)
        and len(set(zip(*map(tuple, digits), strict=True))) == 12
    )


@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_cached_sampling_takes_the_likeliest_of_the_whole_network(config):
    model = small(num_classes=2, **config)
    labels = torch.tensor([0, 1])
    ids = model.sample(2, labels=labels, temperature=0)
    with torch.no_grad():
        for logit, digit in zip(model(ids, labels), model.split(ids.flatten(1)), strict=True):
            assert torch.equal(logit.argmax(-1), digit)


def test_sampling_follows_the_probabilities():
    """The first token's frequencies against the softmax of the network."""
    model = small(**SPLIT)
    with torch.no_grad():
        first = model(random_ids(1))[0][0, 0].softmax(-1)
    ids = model.sample(3000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(ids.flatten(1)[:, 0] % 4, minlength=4) / 3000
    torch.testing.assert_close(counts, first, atol=0.03, rtol=0)
    narrow = model.sample(200, top_k=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(narrow, model.sample(200, temperature=0))
    assert torch.equal(narrow, model.sample(200, top_p=1e-6))


def test_generator_and_guidance():
    model = small(num_classes=2, class_dropout=0.1, **SPLIT)

    def run(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.sample(4, generator=generator, **options)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    guided = run(1, guidance=3.0, labels=torch.tensor([0, 1, 0, 1]))
    assert guided.shape == (4, 2, 2, 3) and int(guided.max()) < 12
    # The likeliest of none + guidance * (label - none), also where it leads away from the label.
    labels, none_label = torch.tensor([0, 1, 0, 1]), torch.full((4,), 2)
    for guidance in (3.0, 0.5, -1.0):
        ids = run(1, guidance=guidance, labels=labels, temperature=0)
        with torch.no_grad():
            pairs = zip(model(ids, labels), model(ids, none_label), strict=True)
            logits = [none + guidance * (label - none) for label, none in pairs]
        for logit, digit in zip(logits, model.split(ids.flatten(1)), strict=True):
            chosen = logit.gather(-1, digit[..., None])[..., 0]
            torch.testing.assert_close(chosen, logit.amax(-1), atol=1e-4, rtol=1e-5)
    # Guidance 0 is "none" alone, whatever the label.
    none = run(1, guidance=0.0, labels=torch.tensor([0, 0, 0, 0]))
    assert torch.equal(none, run(1, guidance=0.0, labels=torch.tensor([1, 1, 1, 1])))


def test_samples_have_no_dropout_in_any_mode():
    model = small(dropout=0.5, **SPLIT)

    def run():
        return model.sample(4, generator=torch.Generator().manual_seed(1))

    ids = run()
    model.train()
    assert torch.equal(run(), ids) and torch.equal(run(), ids)
    assert not torch.equal(model.loss(ids), model.loss(ids)), "training has no dropout"


def test_top_k_of_equal_logits_takes_k():
    model = small(**SMALL)
    with torch.no_grad():
        model.heads[0].weight.zero_()
    ids = model.sample(50, top_k=2, generator=torch.Generator().manual_seed(0))
    assert len(ids.unique()) == 2


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_the_lowest_temperatures_take_the_likeliest(temperature):
    model = small(**SPLIT)
    assert torch.equal(model.sample(2, temperature=temperature), model.sample(2, temperature=0))


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_not_drawn_from(temperature):
    model = small(num_classes=2, class_dropout=0.1, **SPLIT)
    with pytest.raises(FailedComputationError, match="logits of GPT must be finite"):
        model.sample(2, temperature=temperature, guidance=1e300)
    with torch.no_grad():
        model.norm.bias.fill_(math.nan)
    with pytest.raises(FailedComputationError, match="logits of GPT must be finite"):
        model.sample(2, temperature=temperature)


def test_learns_a_pattern_and_makes_it():
    torch.manual_seed(0)
    model = GPT(GPTConfig(num_classes=2, **SPLIT))
    ids, labels = random_ids(2, seed=7), torch.tensor([0, 1])
    guess = model.eval().loss(ids, labels)
    torch.testing.assert_close(guess, torch.full((2,), math.log(12)), atol=0.1, rtol=0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.loss(ids, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    made = model.eval().sample(2, labels=labels, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made, ids)


def test_files_and_decoding(tmp_path):
    tokenizer = vt.create_model("vidtok_fsq_causal_488_4096", ch=4, ch_mult=(1, 1, 1, 1)).eval()
    grid = tokenizer.token_grid(5, 16, 16)
    torch.manual_seed(0)
    factors = balanced_factors((8, 8, 8, 8, 8, 8))
    assert math.prod(factors) == 8**6 and factors == (512, 512)
    assert balanced_factors((8, 8, 8, 8)) == ()
    thin = {"hidden_size": 16, "depth": 1, "num_heads": 2, "grid": grid, "codebook_size": 4096}
    model = vt.create_generator("gpt_small", factors=(64, 64), **thin)
    model.origin = LatentOrigin(5, 16, 16, tokenizer_id=tokenizer.model_id)
    model.save_pretrained(tmp_path / "gpt")
    found = vt.load_generator(tmp_path / "gpt")
    ids = found.sample(1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids, model.eval().sample(1, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        video = found.decode(tokenizer, ids)
    assert video.shape == (1, 3, 5, 16, 16)
    assert "gpt_small" in vt.list_generators("gpt*")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GPTConfig(codebook_size=10, factors=(4, 3)), "factors must be of product 10"),
        (lambda: GPTConfig(grid=(2, 2)), "grid must be three integers"),
        (lambda: small(**SMALL)(random_ids()[:, :1]), "ids must be integers .B, 2, 2, 3."),
        (lambda: small(**SMALL).loss(random_ids() + 12), r"ids must be in 0..11, got 1\d..23"),
        (lambda: small(**SMALL)(random_ids() * 0 - 1), r"ids must be in 0..11, got -1..-1"),
        (lambda: small(**SMALL).sample(1, temperature=-1), "temperature must be >= 0"),
        (lambda: small(**SMALL).sample(1, temperature=float("nan")), "temperature must be >= 0"),
        (lambda: small(**SMALL).sample(1, guidance=2.0), "guidance must be 1"),
        (lambda: small(**SMALL).sample(1, guidance=math.nan), "guidance must be finite, got nan"),
        (lambda: small(**SMALL).sample(1, guidance=math.inf), "guidance must be finite, got inf"),
        (
            lambda: small(**SMALL).loss(random_ids(), torch.tensor([0])),
            r"loss: labels must be 3 integers in 0..0, got .0.",
        ),
        (lambda: small(**SMALL).loss(random_ids(1), torch.tensor([7])), r"in 0..0, got .7."),
        (lambda: small(**SMALL).loss(random_ids(1), torch.tensor([0.0])), "must be 1 integers"),
        (
            lambda: small(class_dropout=0.5, **SMALL).loss(random_ids(1), torch.tensor([1])),
            r"loss: labels must be 1 integers in 0..0, got .1.",
        ),
        (
            lambda: small(class_dropout=0.5, **SMALL)(random_ids(2), torch.tensor([1])),
            r"GPT: labels must be 2 integers in 0..1, got .1.",
        ),
        (lambda: small(**SMALL).sample(1, sampler="ode"), "must be given no"),
        (lambda: small(**SMALL).sample(0), "num_samples must be >= 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
