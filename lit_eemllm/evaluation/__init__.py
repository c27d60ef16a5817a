"""Evaluation by generation and by loss, each with its shuffled-image control."""
