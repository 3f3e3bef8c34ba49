"""Callbacks: what measures, saves, shows and stops a run. They know the model only through `lm`."""
