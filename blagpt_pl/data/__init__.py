"""Tokens for training and measuring: shards, the stream, tokenizers, sources, and the data module over them.

Importing this makes every source and tokenizer known by its bare name in a configuration.
"""

from blagpt_pl.data.as_bytes import AsBytes
from blagpt_pl.data.fineweb import FineWeb, FineWeb10B
from blagpt_pl.data.module import TokenData
from blagpt_pl.data.python_library import PythonLibrary
from blagpt_pl.data.shards import Shard, ShardSet, find_files, write_pieces, write_shard
from blagpt_pl.data.sources import ShardFiles, Source
from blagpt_pl.data.stream import EvalBatch, EvalBatches, TokenStream, TrainBatches, check_batch, rank_samples, split
from blagpt_pl.data.tokenizers import ByteTokenizer, GPT2Tokenizer, Tokenizer

__all__ = [
    "AsBytes",
    "ByteTokenizer",
    "EvalBatch",
    "EvalBatches",
    "FineWeb",
    "FineWeb10B",
    "GPT2Tokenizer",
    "PythonLibrary",
    "Shard",
    "ShardFiles",
    "ShardSet",
    "Source",
    "TokenData",
    "TokenStream",
    "Tokenizer",
    "TrainBatches",
    "check_batch",
    "find_files",
    "rank_samples",
    "split",
    "write_pieces",
    "write_shard",
]
