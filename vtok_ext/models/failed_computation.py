"""The error of a computation that fails by its weights or settings, not by a defect of the code."""


class FailedComputationError(RuntimeError):
    """NaN, infinity or no end in sight; the message says where, and what may have caused it.

    The command line reports it in one line as it does bad input.
    """
