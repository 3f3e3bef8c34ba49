"""The layer below all others for `validate` and `test`: the configuration that a checkpoint carries, as far as it says what
was trained. It is left out where the user names a model's class, and so a configuration of his own.
"""

from typing import Any

from blagpt_pl.callbacks.atomic_io import read_checkpoint
from blagpt_pl.lab.config_files import read_file
from blagpt_pl.lab.layers import flag_value
from blagpt_pl.lab.strict_yaml import load_mapping, load_text


def checkpoint_layer(flags: list[tuple[str, str]]) -> tuple[str, dict] | None:
    """The checkpoint's path, and its own model, data, seed and precision; None if there is no checkpoint or no need of it.

    Args:
        flags: all flags with their texts, `config` among them.

    Raises:
        UserError: a layer cannot be read, or the checkpoint cannot.
    """
    path = None
    for flag, text in flags:
        said = load_mapping(read_file(text), text) if flag == "config" else {flag: flag_value(text, flag)}
        if any(_names_model(key, value) for key, value in said.items()):
            return None
        path = said.get("ckpt_path", path)
    return None if not isinstance(path, str) else (path, _saved(path))


def _names_model(key: Any, value: object) -> bool:
    is_partial = isinstance(value, dict) and "class_path" not in value
    return key == "model.class_path" or (key == "model" and not is_partial)


def _saved(path: str) -> dict:
    saved = load_text(read_checkpoint(path).get("config", ""), path) or {}
    base = {key: saved[key] for key in ("seed_everything", "model", "data") if key in saved}
    return {**base, "trainer": {"precision": saved.get("trainer", {}).get("precision")}}
