"""Losses: what a model is asked to minimise."""
