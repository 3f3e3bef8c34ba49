"""Optimizers, the groups they receive, and the schedules of their learning rates. Knows no model and no part."""
