"""What a mechanism costs before anything is trained: formulas, and the real model on tensors without data."""
