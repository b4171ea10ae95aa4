"""Callbacks: behaviour that can be added to a run, one file per callback."""
