"""The FSQ entropy loss under test, with and without the clamp of single tokens' probabilities."""

import torch
from case_fsq import _make_fsq
from helpers import in_float64
from op_case import OpCase, Sample

from vtok_ext.ops.fsq_entropy import fsq_entropy_loss, fsq_entropy_loss_reference


def _function(clamp):
    def entropy_terms(z, levels, **kwargs):
        """The terms: `loss` is their plain sum, which may cancel to 0, and is tested apart."""
        return fsq_entropy_loss(z, levels, clamp_per_sample=clamp, **kwargs)[1:]

    return entropy_terms


def _reference(clamp):
    def entropy_terms(z, levels, **kwargs):
        """The definition in float64: a dense float32 softmax is itself off by 1e-4, since its
        logits reach 1,000."""
        result = fsq_entropy_loss_reference(in_float64(z), levels, clamp_per_sample=clamp, **kwargs)
        real = z.dtype if z.dtype == torch.float64 else torch.float32
        return (*(term.to(real) for term in result[1:4]), result.counts)

    return entropy_terms


_EIGHT6 = [8] * 6
# A low temperature decides every token for one corner; a high one leaves many codes above and
# below the clamp.
_SAMPLES = [
    Sample({"z": (1, 6, 2, 3, 2)}, {"levels": _EIGHT6, "channel_dim": 1}),  # VidTok 488
    Sample({"z": (2, 5, 1, 7, 3)}, {"levels": [8, 8, 8, 6, 5], "channel_dim": 1}),
    Sample({"z": (9, 8)}, {"levels": [3, 9], "num_codebooks": 4}),  # small: forked in a test
    Sample({"z": (5, 6)}, {"levels": _EIGHT6, "inverse_temperature": 1.0}),
    Sample({"z": (67, 3)}, {"levels": [7, 5, 4], "inverse_temperature": 4.0}),
    Sample(
        {"z": (3, 12, 7)},
        {
            "levels": [26, 27, 2, 16],
            "channel_dim": 1,
            "num_codebooks": 3,
            "inverse_temperature": 3.0,
        },
    ),
    Sample({"z": (11, 1)}, {"levels": [256], "inverse_temperature": 10.0}),  # no high half
    Sample({"z": (4, 3)}, {"levels": [40, 2, 255], "inverse_temperature": 0.5}),
    Sample({"z": (3,)}, {"levels": [8, 5, 3]}),
    # Without tokens every scalar is NaN, which shared tests of equal bits cannot compare:
    # test_fsq_entropy.py has that case.
]


def _case(name, clamp):
    return OpCase(
        name=name,
        function=_function(clamp),
        reference=_reference(clamp),
        samples=_SAMPLES,
        make=_make_fsq,
        differentiable=("z",),
        # A gradient is a difference of logarithms up to 11.5, whose last bit is 1e-6.
        gradient_factor=8.0,
        raw=(
            ("fsq_entropy_assign", lambda: (torch.randn(2, 7, 3), [8, 5, 3], 100.0, clamp)),
            (
                "fsq_entropy_assign_backward",
                lambda: (
                    torch.randn(2, 7, 3),
                    torch.ones(()),
                    torch.randn(2, 120),
                    torch.ones(()),
                    [8, 5, 3],
                    100.0,
                    clamp,
                ),
            ),
            ("fsq_entropy_average", lambda: (torch.rand(2, 120),)),
            ("fsq_entropy_average_backward", lambda: (torch.rand(2, 120), torch.ones(()))),
        ),
    )


FSQ_ENTROPY = _case("fsq_entropy", False)
FSQ_ENTROPY_CLAMPED = _case("fsq_entropy_clamped", True)
