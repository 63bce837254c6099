"""The ops: each file holds a plain PyTorch reference, its checks, an autograd.Function and the
function."""
