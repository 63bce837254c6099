"""Training: an overfit loop for one clip, and the Muon optimiser it uses."""
