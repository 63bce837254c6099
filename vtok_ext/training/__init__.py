"""Training: losses, the loop with checkpoints that survive a kill, recipes; the overfit loop of the
demo and its Muon optimiser."""
