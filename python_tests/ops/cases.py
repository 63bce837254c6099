"""The ops under test: from this list test_ops.py makes every test that all ops share."""

from case_fsq import FSQ, FSQ_DECODE
from case_fsq_entropy import FSQ_ENTROPY, FSQ_ENTROPY_CLAMPED

OP_CASES = [FSQ, FSQ_DECODE, FSQ_ENTROPY, FSQ_ENTROPY_CLAMPED]
