"""The ops under test: from this list test_ops.py makes every test that all ops share."""

from case_fsq import FSQ, FSQ_DECODE

OP_CASES = [FSQ, FSQ_DECODE]
