"""The files that `--config` names, and which ones may have been meant where there is no such file."""

import difflib
from pathlib import Path

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.catalogue import configs_folder


def read_file(path: str) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: the file is missing or is not text; files of a like name are told.
    """
    file = Path(path)
    if not file.is_file():
        kind = "is a folder" if file.is_dir() else "no such file"
        near = " or ".join(nearest(file))
        raise ConfigError(f"--config: {path!r}: {kind} (in {Path.cwd()}){f'; did you mean {near}?' if near else ''}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path!r}: cannot be read as text ({error})") from None


def nearest(file: Path) -> list[str]:
    """At most three files whose names are like that of one that is not there: in its folder, here, and in `configs`."""
    folders = [folder for folder in (file.parent, Path()) if folder.is_dir()]
    found = [one for folder in folders for one in folder.glob("*.yaml")]
    configs = configs_folder()
    found += configs.rglob("*.yaml") if configs else ()
    names = {one.stem.lower() for one in found}
    wanted = file.name.removesuffix(".yaml").removesuffix(".yml").lower()
    close = difflib.get_close_matches(wanted, names, 3, 0.6)
    paths = sorted(dict.fromkeys(map(str, found)), key=lambda path: (not path.startswith(str(file.parent)), path))
    return [path for name in close for path in paths if Path(path).stem.lower() == name][:3]
