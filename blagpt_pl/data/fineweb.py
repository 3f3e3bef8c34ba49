"""FineWeb, 10.3 billion GPT-2 tokens in 103 training shards and one validation shard, from the Hugging Face hub.

Source   Penedo et al. 2024, "The FineWeb Datasets", arXiv:2406.17557; tokenised and packed by Keller Jordan as the
         dataset `kjj0/fineweb10B-gpt2`, the corpus of llm.c and of the modded-nanogpt speedrun
Differs  from calling `hf_hub_download` alone: that checks the size only. Here a file lands in `.download` first, its
         sha256 (the hub's LFS etag) and header are checked, and only then is it renamed to its final name
Cost     100 million tokens, 200 MB a shard; what is there and whole is not asked for again
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from blagpt_pl.data.module import TokenData
from blagpt_pl.data.shards import Shard
from blagpt_pl.data.sources import Source
from blagpt_pl.data.tokenizers import GPT2Tokenizer
from blagpt_pl.errors import ConfigError, DataError

ALL_SHARDS = 103


class FineWeb10B(Source):
    """The first `shards` training shards and the validation shard, kept in `root`."""

    def __init__(
        self, root: str = "data/fineweb10B", shards: int = ALL_SHARDS, repository: str = "kjj0/fineweb10B-gpt2"
    ) -> None:
        if not 1 <= shards <= ALL_SHARDS:
            raise ConfigError(
                f"data.source.init_args.shards: {shards} (expected 1 to {ALL_SHARDS}); fix: {ALL_SHARDS} for all of it"
            )
        self.root = Path(root)
        self.shards = shards
        self.repository = repository
        self.tokenizer = GPT2Tokenizer()

    def train_files(self) -> list[Path]:
        return [self.root / f"fineweb_train_{number:06d}.bin" for number in range(1, self.shards + 1)]

    def val_files(self) -> list[Path]:
        return [self.root / "fineweb_val_000000.bin"]

    def fetch(self) -> None:
        files = [*self.val_files(), *self.train_files()]
        if all(map(is_whole, files)):
            return
        with _one_at_a_time(self.root) as incoming:
            missing = [path for path in files if not is_whole(path)]  # another process may just have fetched some
            for path in tqdm(missing, "FineWeb", unit="shard"):
                os.replace(self._download(path.name, incoming), path)

    def _download(self, name: str, incoming: Path) -> Path:
        """One file of the hub, whole and checked, in `incoming`."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        at = f"data: {name} of {self.repository}"
        try:
            # the revision of the etag is the one downloaded, even if the repository changes in between
            about = get_hf_file_metadata(hf_hub_url(self.repository, name, repo_type="dataset"))
            path = Path(
                hf_hub_download(
                    self.repository, name, repo_type="dataset", revision=about.commit_hash, local_dir=incoming
                )
            )
        except Exception as error:  # the hub, its http client and its storage client share no base class
            absent = isinstance(error, EntryNotFoundError | RepositoryNotFoundError)
            if absent and not isinstance(error, LocalEntryNotFoundError):
                fix = "correct data.source.init_args.repository, or copy the file into root"
                raise DataError(f"{at}: not on the hub (expected a dataset that holds it); fix: {fix}") from error
            raise DataError(
                f"{at}: {_reason(error)} (expected it from {endpoint}); fix: run again with a network, or copy the "
                f"file into {self.root}"
            ) from error
        try:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if re.fullmatch("[0-9a-f]{64}", about.etag or "") and sha256 != about.etag:
                raise DataError(
                    f"{at}: sha256 {sha256[:12]}… (expected {about.etag[:12]}…): damaged on the way; fix: run again"
                )
            Shard.open(path)
        except DataError:
            path.unlink()
            raise
        return path


def is_whole(path: Path) -> bool:
    try:
        Shard.open(path)
    except DataError:
        return False
    return True


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[Path]:
    """A folder to download into, on the disk of `root`, held by one process; a killed one's remains are removed."""
    incoming = root / ".download"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"data: {root}: {error.strerror} (expected a folder to write to); fix: data.source.init_args.root"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        try:
            yield incoming
        finally:
            shutil.rmtree(incoming, ignore_errors=True)


def _reason(error: Exception) -> str:
    """The first line of an error, without what follows a `?` in an address: signed addresses hold secrets."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"HTTP status {status}"
    line = re.sub(r"\?\S*", "", str(error).partition("\n")[0]).strip()
    return f"{type(error).__name__}: {line[:160]}"


class FineWeb(TokenData):
    """`TokenData` on FineWeb, for use from Python: `FineWeb(context=1024, batch_size=512, ...)`."""

    def __init__(
        self,
        context: int,
        batch_size: int,
        device_batch_size: int,
        val_tokens: int,
        test_tokens: int | None = None,
        shuffle_seed: int | None = None,
        root: str = "data/fineweb10B",
        shards: int = ALL_SHARDS,
    ) -> None:
        source = FineWeb10B(root, shards)
        super().__init__(source, context, batch_size, device_batch_size, val_tokens, test_tokens, shuffle_seed)
