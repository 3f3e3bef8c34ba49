"""Sequence mixers that are not attention: recurrences, and the short convolutions before them."""
