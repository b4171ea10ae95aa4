"""Loggers: the places that keep what a run logged, one file per logger."""
