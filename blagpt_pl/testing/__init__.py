"""Promises of a part and of a model, checked by running them; for our tests, for `blagpt check`, and for strangers' parts.

How      every parameter is first moved by N(0, 0.03²), for a zero start hides leaks. Row t of a batch has its position t
         changed: two runs, seeded alike, tell how far output s moves with input t, for all t and s at once (`influence`).
Lengths  odd and prime, so that nothing hides behind a multiple of a chunk, patch or segment
Raises   AssertionError, saying which promise was broken and where
"""

from blagpt_pl.testing.certificate import check_model
from blagpt_pl.testing.part import check_part, kind_of

__all__ = ["check_model", "check_part", "kind_of"]
