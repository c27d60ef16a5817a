"""Training: what is trained, the optimiser step, checkpoints, and the story of a run (`fit`)."""
