"""Checkpoints: what is saved, how it is written to disk and how it comes back."""
