"""Training: what is trained, the optimiser step, checkpoints, and a whole run (`fit`)."""
