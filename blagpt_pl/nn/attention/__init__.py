"""Attention: the pipeline project → edits → core → out, and the parts that plug into it."""
