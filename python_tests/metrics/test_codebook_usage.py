"""Codebook usage: closed forms, batches that add up, refusals."""

import math

import pytest
import torch

from vtok_ext.metrics import CodebookCounter, codebook_usage


def test_one_code():
    usage = codebook_usage(torch.full((2, 3, 4), 7, dtype=torch.int32), 16)
    assert (usage.num_tokens, usage.num_used, usage.fraction_used) == (24, 1, 1 / 16)
    assert usage.perplexity == pytest.approx(1)
    assert usage.bits_per_token == pytest.approx(0)


def test_all_codes_equally_often():
    usage = codebook_usage(torch.arange(64).repeat(3), 64)
    assert (usage.num_tokens, usage.num_used, usage.fraction_used) == (192, 64, 1.0)
    assert usage.perplexity == pytest.approx(64)
    assert usage.bits_per_token == pytest.approx(6)


def test_unequal_frequencies():
    usage = codebook_usage(torch.tensor([0, 0, 0, 5]), 8)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert usage.perplexity == pytest.approx(math.exp(entropy))


def test_batches_add_up_even_for_a_huge_codebook():
    size = 2**40
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 1000, (5, 100), generator=generator) * 10**9
    counter = CodebookCounter(size)
    for batch in indices:
        counter.update(batch)
    counter.update(indices[:0])
    assert counter.result() == codebook_usage(indices, size)


@pytest.mark.parametrize(
    ("indices", "size", "error", "words"),
    [
        (torch.zeros(3), 8, TypeError, "must be integers, got torch.float32"),
        (torch.tensor([0, 8]), 8, ValueError, r"must lie in 0..7, got 0..8"),
        (torch.tensor([-1, 2]), 8, ValueError, r"must lie in 0..7, got -1..2"),
        (torch.tensor([], dtype=torch.int64), 8, ValueError, "must not be empty"),
        (torch.tensor([0]), 0, ValueError, "codebook_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(indices, size, error, words):
    with pytest.raises(error, match=words):
        codebook_usage(indices, size)
