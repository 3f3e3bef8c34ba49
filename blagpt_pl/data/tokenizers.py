"""Tokenizers: text to token ids and back, and which UTF-8 bytes each id stands for.

Source   GPT-2's byte-pair encoding, Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", through
         tiktoken; plain bytes
Differs  special tokens in a text are text (`<|endoftext|>` is encoded as characters); end of text counts 0 bytes, so
         that bits per byte divides by bytes of text alone
Cost     GPT-2's tables (1.5 MB) are fetched and read at the first use, about 0.2 s
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from blagpt_pl.errors import DataError

if TYPE_CHECKING:
    import tiktoken


class Tokenizer(ABC):
    """Base of the tokenizers. `vocab_size` and `end_of_text` are known without reading any file."""

    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Text of `tokens`; ids beyond the vocabulary (a padded model can draw them) are left out."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray | None:
        """(vocab_size,) int64: UTF-8 bytes of each id, 0 for end of text; None where a token has no fixed length."""

    def token_bytes(self) -> list[bytes] | None:
        """The UTF-8 bytes of each id, none for end of text; None where a token does not stand for bytes of its own."""
        return None


class GPT2Tokenizer(Tokenizer):
    """50,257 byte-pair tokens; 50256 stands before each document."""

    vocab_size = 50257
    end_of_text = 50256

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSError, a wrong checksum is ValueError
            raise DataError(
                f"data: GPT2Tokenizer: its tables could not be fetched ({type(error).__name__}); fix: set "
                f"TIKTOKEN_CACHE_DIR to a folder that holds them, or run once with a network"
            ) from error

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        return self._encoding.decode([token for token in tokens if 0 <= token < self.vocab_size])

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(text) for text in self.token_bytes()], np.int64)

    def token_bytes(self) -> list[bytes]:
        return [*map(self._encoding.decode_single_token_bytes, range(self.end_of_text)), b""]


class ByteTokenizer(Tokenizer):
    """The 256 bytes, and 256 as end of text. It needs no file."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if 0 <= token < self.end_of_text).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int64)

    def token_bytes(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in range(256)), b""]
