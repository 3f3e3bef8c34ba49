"""A configuration whose weights come from a checkpoint of its own, or are tiny, has no need of its donor's file.

`FromCheckpoint` says what a model started from. A model that is rebuilt, resumed or measured gets its weights from its own
checkpoint, where the donor's have long been trained; the donor may be gone.
"""

from typing import Any

from jsonargparse import Namespace

from blagpt_pl.lab.sizes import class_of
from blagpt_pl.nn.init_from import FromCheckpoint


def without_donor(node: Any) -> Any:
    """A node of a configuration, parsed or not, with `otherwise` in the place of every `FromCheckpoint`."""
    if isinstance(node, list):
        return [without_donor(item) for item in node]
    if not isinstance(node, dict | Namespace):
        return node
    values = vars(node) if isinstance(node, Namespace) else node
    cls = class_of({"class_path": values.get("class_path")})
    if cls is not None and issubclass(cls, FromCheckpoint):
        said = values.get("init_args") or {}
        otherwise = said.get("otherwise")
        return node if otherwise is None else without_donor(otherwise)
    kept = {key: without_donor(value) for key, value in values.items()}
    return Namespace(**kept) if isinstance(node, Namespace) else kept
