"""Tokenizers: round trips, byte lengths that add up, and GPT-2's tables with and without a network."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blagpt_pl.data import ByteTokenizer, GPT2Tokenizer, Tokenizer
from blagpt_pl.errors import DataError

CACHE = Path(__file__).resolve().parents[2].parent / "shared/data/tiktoken-cache"
needs_tables = pytest.mark.skipif(not CACHE.is_dir(), reason="GPT-2's tables are not on this machine")


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    tokenizer = GPT2Tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        tokenizer.encode("")  # reads the tables
    return tokenizer


def check(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode(tokens) == text
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int64
    assert lengths[tokenizer.end_of_text] == 0
    assert lengths[tokens].sum() == len(text.encode())
    pieces = tokenizer.token_bytes()
    assert [len(piece) for piece in pieces] == lengths.tolist()
    assert b"".join(pieces[token] for token in tokens) == text.encode()


@given(st.text())
def test_bytes(text: str) -> None:
    check(ByteTokenizer(), text)


def test_bytes_that_are_no_text() -> None:
    assert ByteTokenizer().decode([256, 104, 105, 256, 255, 300, -1]) == "hi\ufffd"


@needs_tables
@pytest.mark.parametrize("text", ["hello world", "", "naïve 🙂 日本語", "<|endoftext|>", "  \n\t code()"])
def test_gpt2(gpt2: GPT2Tokenizer, text: str) -> None:
    check(gpt2, text)


@needs_tables
def test_gpt2_is_tiktokens(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.decode([31373, 50300, 995]) == "hello world"  # 50300 is padding of a vocabulary of 50304
    assert gpt2._encoding.n_vocab == gpt2.vocab_size and gpt2._encoding.eot_token == gpt2.end_of_text


def test_gpt2_without_tables_or_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tiktoken

    def offline(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    tokenizer = GPT2Tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    with pytest.raises(DataError, match=r"\(ConnectionError\); fix: set TIKTOKEN_CACHE_DIR"):
        tokenizer.byte_lengths()
