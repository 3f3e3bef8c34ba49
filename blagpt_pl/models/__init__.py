"""Architectures, one a file; none imports another."""
