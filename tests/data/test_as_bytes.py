"""Token shards as bytes: the same text, the same documents, written once, and measured by the same bytes."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from blagpt_pl.data import (
    AsBytes,
    ByteTokenizer,
    EvalBatches,
    FineWeb10B,
    GPT2Tokenizer,
    PythonLibrary,
    ShardFiles,
    ShardSet,
    Source,
    TokenData,
    Tokenizer,
    as_bytes,
    write_shard,
)
from blagpt_pl.errors import ConfigError, DataError
from blagpt_pl.lab.train import run
from blagpt_pl.ruler import Ruler

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
END = 7  # in the middle of the vocabulary, where GPT-2's is the last


class Pieces(Tokenizer):
    """300 ids: pieces of 1 to 5 bytes, ASCII or not, whole characters or not; id 20 has none, and 7 ends a text."""

    vocab_size = 300
    end_of_text = END

    def __init__(self) -> None:
        dice = np.random.default_rng(0)
        self.pieces = [dice.bytes(n) for n in dice.integers(1, 6, self.vocab_size)]
        self.pieces[END] = self.pieces[20] = b""

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self.pieces], np.int64)

    def token_bytes(self) -> list[bytes] | None:
        return self.pieces


def naive(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """One token after the other."""
    pieces, out = tokenizer.token_bytes(), []
    for token in tokens:
        out += [256] if token == tokenizer.end_of_text else list(pieces[token])
    return out


def read(path: Path, vocab_size: int = 257) -> list[int]:
    shards = ShardSet.open([path], vocab_size)
    out = np.empty(shards.n_tokens, np.int64)
    shards.read(0, out)
    return out.tolist()


def random_tokens(seed: int, n: int = 900) -> list[int]:
    tokens = np.random.default_rng(seed).integers(0, Pieces.vocab_size, n)
    tokens[:: n // 6] = END
    return tokens.tolist()


@pytest.fixture
def source(tmp_path: Path) -> ShardFiles:
    """Two training shards and one of validation, of tokens."""
    for i, name in enumerate(("t_0", "t_1", "v_0")):
        write_shard(tmp_path / "tokens" / f"{name}.bin", random_tokens(i), Pieces.vocab_size)
    folder = tmp_path / "tokens"
    return ShardFiles([f"{folder}/t_*.bin"], [f"{folder}/v_*.bin"], Pieces())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "bytes"


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != ".lock")


def state(root: Path) -> dict[str, tuple[int, int, bytes]]:
    about = {name: (root / name).stat() for name in listing(root)}
    return {name: (a.st_ino, a.st_mtime_ns, (root / name).read_bytes()) for name, a in about.items()}


# ---------------------------------------------------------------------- what is written


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 299), min_size=1, max_size=60))
def test_a_chunk_is_what_a_loop_makes_of_it(tokens: list[int]) -> None:
    made = as_bytes._Table(Pieces()).spell(np.array(tokens))
    assert made.dtype == np.uint16
    assert made.tolist() == naive(tokens, Pieces())


@pytest.mark.parametrize("chunk", [1, 7, 900, 2**18])
def test_the_same_documents_in_the_same_order(
    source: ShardFiles, root: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a chunk ends in: a character, a document, at a token without bytes."""
    monkeypatch.setattr(as_bytes, "CHUNK_TOKENS", chunk)
    mine = AsBytes(source, str(root))
    assert isinstance(mine.tokenizer, ByteTokenizer)
    assert not root.exists(), "no I/O yet"
    mine.fetch()
    assert [path.relative_to(root).as_posix() for path in mine.train_files()] == ["tokens/t_0.bin", "tokens/t_1.bin"]
    assert [path.relative_to(root).as_posix() for path in mine.val_files()] == ["tokens/v_0.bin"]
    for origin, path in zip(
        [*source.train_files(), *source.val_files()], [*mine.train_files(), *mine.val_files()], strict=True
    ):
        tokens, spelt = read(origin, 300), read(path)
        assert spelt == naive(tokens, source.tokenizer)
        assert mine.tokenizer.decode(spelt) == source.tokenizer.decode(tokens)
        assert spelt.count(256) == tokens.count(END) >= 6
        assert len(spelt) - spelt.count(256) == source.tokenizer.byte_lengths()[tokens].sum()
    whole = ["t_0.bin", "t_1.bin", "v_0.bin"]
    assert listing(root) == sorted(f"tokens/{name}{end}" for name in whole for end in ("", ".origin"))


def test_a_chunk_without_bytes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_bytes, "CHUNK_TOKENS", 2)
    for name, tokens in {"t": [END, 3, 20, 20, 4, 20], "v": [END, 5]}.items():
        write_shard(tmp_path / f"{name}.bin", tokens, 300)
    mine = AsBytes(ShardFiles([f"{tmp_path}/t.bin"], [f"{tmp_path}/v.bin"], Pieces()), str(root))
    mine.fetch()
    assert read(mine.train_files()[0]) == naive([END, 3, 4], Pieces())


def test_memory_is_a_chunks(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a chunk of tokens is ever spelt at a time."""
    monkeypatch.setattr(as_bytes, "CHUNK_TOKENS", 64)
    sizes: list[int] = []
    spell = as_bytes._Table.spell
    monkeypatch.setattr(as_bytes._Table, "spell", lambda self, t: sizes.append(t.size) or spell(self, t))
    for name in "tv":
        write_shard(tmp_path / f"{name}.bin", random_tokens(ord(name), 200), 300)
    AsBytes(ShardFiles([f"{tmp_path}/t.bin"], [f"{tmp_path}/v.bin"], Pieces()), str(root)).fetch()
    assert sizes == [64, 64, 64, 8] * 2


# ---------------------------------------------------------------------- what is there already


def test_what_is_whole_is_left_alone(source: ShardFiles, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AsBytes(source, str(root)).fetch()
    before = state(root)
    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "token_bytes", None)  # nor are the tokenizer's tables asked for
        AsBytes(source, str(root)).fetch()
    assert state(root) == before

    damaged = root / "tokens" / "t_0.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    AsBytes(source, str(root)).fetch()
    after = state(root)
    assert {n: kept[2] for n, kept in after.items()} == {n: kept[2] for n, kept in before.items()}
    assert {n for n in after if after[n][:2] != before[n][:2]} == {"tokens/t_0.bin", "tokens/t_0.bin.origin"}


def change_text(source: ShardFiles) -> None:
    """One token, in the last place: the file's size and name stay."""
    path = source.train_files()[0]
    write_shard(path, [*read(path, 300)[:-1], 3], 300)


def change_count(source: ShardFiles) -> None:
    path = source.train_files()[0]
    write_shard(path, read(path, 300)[:-1], 300)


@pytest.mark.parametrize("change", [change_text, change_count])
def test_a_changed_origin_is_written_again(
    source: ShardFiles, root: Path, change: Callable[[ShardFiles], None]
) -> None:
    mine = AsBytes(source, str(root))
    mine.fetch()
    before = state(root)
    change(source)
    mine.fetch()
    after = state(root)
    assert {n for n in after if after[n] != before[n]} == {"tokens/t_0.bin", "tokens/t_0.bin.origin"}
    assert read(mine.train_files()[0]) == naive(read(source.train_files()[0], 300), source.tokenizer)


def test_another_tokenizer_writes_all_again(source: ShardFiles, root: Path) -> None:
    class Others(Pieces):
        def token_bytes(self) -> list[bytes]:
            return [piece[::-1] for piece in self.pieces]

    AsBytes(source, str(root)).fetch()
    source.tokenizer = Others()
    mine = AsBytes(source, str(root))
    mine.fetch()
    for origin, path in zip(source.train_files(), mine.train_files(), strict=True):
        assert read(path) == naive(read(origin, 300), Others())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_what_is_interrupted_leaves_nothing_half(
    source: ShardFiles, root: Path, stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file is whole, the second is as if it had never been begun; the next time goes on."""
    monkeypatch.setattr(as_bytes, "CHUNK_TOKENS", 300)
    spell, calls = as_bytes._Table.spell, []

    def spell_some(self: as_bytes._Table, tokens: np.ndarray) -> np.ndarray:
        calls.append(tokens.size)
        if len(calls) == 5:
            assert any(name.endswith(".part") for name in listing(root)), "it is being written"
            raise stop
        return spell(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(as_bytes._Table, "spell", spell_some)
        with pytest.raises(stop):
            AsBytes(source, str(root)).fetch()
    assert listing(root) == ["tokens/v_0.bin", "tokens/v_0.bin.origin"]
    before = state(root)
    AsBytes(source, str(root)).fetch()
    after = state(root)
    assert len(after) == 6
    assert before.items() <= after.items()


def test_interrupted_while_a_file_is_replaced(source: ShardFiles, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes stay, but nothing says any more what they were made of: if the tokens come back, they are written again."""
    mine = AsBytes(source, str(root))
    mine.fetch()
    origin = source.train_files()[0]
    old = origin.read_bytes()
    change_text(source)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            mine.fetch()
    origin.write_bytes(old)
    mine.fetch()
    assert read(mine.train_files()[0]) == naive(read(origin, 300), source.tokenizer)


def test_processes_take_turns(source: ShardFiles, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is written by one of them, and nobody goes on before all are there."""
    written: list[Path] = []
    write = AsBytes._write
    monkeypatch.setattr(AsBytes, "_write", lambda self, path, *rest: written.append(path) or write(self, path, *rest))
    start = Barrier(4)

    def fetch() -> list[str]:
        start.wait()
        AsBytes(source, str(root)).fetch()
        return listing(root)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(fetch) for _ in range(4)]
        assert [len(future.result()) for future in futures] == [6] * 4
    assert len(written) == 3


def test_what_a_killed_process_left_is_removed(source: ShardFiles, root: Path) -> None:
    left = root / "tokens" / ".t_0.bin.999999.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    AsBytes(source, str(root)).fetch()
    assert not left.exists()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("index", [0, 411, 899])
def test_an_id_beyond_the_vocabulary(
    source: ShardFiles, root: Path, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding of a model's vocabulary: the file and the index are named, and nothing half is left."""
    monkeypatch.setattr(as_bytes, "CHUNK_TOKENS", 100)
    path = source.train_files()[0]
    tokens = read(path, 300)
    tokens[index] = 301
    write_shard(path, tokens, 320)
    with pytest.raises(DataError) as error:
        AsBytes(source, str(root)).fetch()
    message = str(error.value)
    assert message.startswith(f"data: {path}: token id 301 at index {index} (expected < 300, the tokenizer's vocab")
    assert "\n" not in message
    assert listing(root) == ["tokens/v_0.bin", "tokens/v_0.bin.origin"]


class Mute(Pieces):
    """It counts no bytes and has none."""

    token_bytes = Tokenizer.token_bytes

    def byte_lengths(self) -> None:
        return None


class Silent(Pieces):
    def token_bytes(self) -> None:
        return None


class Short(Pieces):
    def token_bytes(self) -> list[bytes]:
        return self.pieces[:-1]


def test_a_tokenizer_that_has_no_bytes(source: ShardFiles, root: Path) -> None:
    source.tokenizer = Mute()
    with pytest.raises(ConfigError, match=r"^data\.source\.init_args\.source: Mute cannot say .*; fix: [^\n]*$"):
        AsBytes(source, str(root))
    for tokenizer in (Silent(), Short()):  # only seen when it is asked, which may need a network
        source.tokenizer = tokenizer
        with pytest.raises(ConfigError, match=rf": {type(tokenizer).__name__} cannot say the bytes of its tokens"):
            AsBytes(source, str(root)).fetch()
    assert not listing(root)


def test_bytes_of_bytes_are_refused(source: ShardFiles) -> None:
    with pytest.raises(ConfigError, match=r"the shards of PythonLibrary are bytes already .*; fix: name it in data"):
        AsBytes(PythonLibrary())
    with pytest.raises(ConfigError, match="AsBytes are bytes already"):
        AsBytes(AsBytes(source))


def test_no_shard_replaces_its_own_tokens(source: ShardFiles, tmp_path: Path) -> None:
    before = state(tmp_path / "tokens")
    with pytest.raises(ConfigError, match=r"init_args\.root: .*v_0\.bin is a shard of tokens .*; fix: name another"):
        AsBytes(source, str(tmp_path)).fetch()
    assert state(tmp_path / "tokens") == before


def test_two_shards_of_one_name_are_refused(root: Path, tmp_path: Path) -> None:
    paths = [tmp_path / side / "tokens" / "0.bin" for side in ("a", "b")]
    for i, path in enumerate(paths):
        write_shard(path, random_tokens(i), 300)
    source = ShardFiles([str(paths[0])], [str(paths[1])], Pieces())
    with pytest.raises(ConfigError, match=r"b/tokens/0\.bin and .*a/tokens/0\.bin would both become .*tokens/0\.bin"):
        AsBytes(source, str(root)).fetch()
    assert not listing(root)


def test_a_folder_that_cannot_be_written(source: ShardFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: File exists .*; fix: data\.source\.init_args\.root$"):
        AsBytes(source, str(tmp_path / "file")).fetch()
    root = tmp_path / "bytes"
    (root / "tokens" / "v_0.bin.origin").mkdir(parents=True)
    with pytest.raises(DataError, match=r"v_0\.bin\.origin: .* \(expected to write it\)"):
        AsBytes(source, str(root)).fetch()


def test_files_are_named_without_the_data() -> None:
    files = AsBytes(FineWeb10B(shards=2)).train_files()
    assert files == [Path(f"data/bytes/fineweb10B/fineweb_train_00000{i}.bin") for i in (1, 2)]
    assert AsBytes(FineWeb10B(root="here/x/..")).val_files() == [Path("data/bytes/here/fineweb_val_000000.bin")]


# ---------------------------------------------------------------------- the same ruler


def measured(source: Source, val_tokens: int, nats_of: torch.Tensor) -> dict[str, float]:
    """The ruler over a source's validation tokens, of a model that gives every id its own number of nats."""
    shards = ShardSet.open(source.val_files(), source.tokenizer.vocab_size)
    context, ruler = max(64, val_tokens // 30), Ruler()
    for tokens, n_bytes in EvalBatches(shards, 0, val_tokens, context, 4, 0, 1, source.tokenizer.byte_lengths()):
        targets = tokens[:, 1:]
        targets = targets[targets >= 0]
        ruler.update(nats_of[targets.long()].sum(), torch.tensor(targets.numel()), n_bytes)
    return {**ruler.compute(), "bytes": float(ruler.sums[2])}


def check_ruler(source: ShardFiles, root: Path) -> None:
    """A model of tokens and the model of bytes that gives the same text the same probability have one val/bpb.

    Of 0.7 nats a byte and 3 an end of text, in both: whatever the tokens are, the text is as likely.
    """
    mine = AsBytes(source, str(root))
    mine.fetch()
    tokens, spelt = read(source.val_files()[0], source.tokenizer.vocab_size), read(mine.val_files()[0])
    end, lengths = source.tokenizer.end_of_text, torch.from_numpy(source.tokenizer.byte_lengths())
    assert tokens[0] == end
    assert spelt[0] == 256

    of_tokens = 0.7 * lengths.double()
    of_tokens[end] = 3.0
    of_bytes = torch.full((257,), 0.7, dtype=torch.float64)
    of_bytes[256] = 3.0
    ours = measured(mine, len(spelt) - 1, of_bytes)
    theirs = measured(source, len(tokens) - 1, of_tokens)

    ends = tokens[1:].count(end)
    n_bytes = len(spelt) - 1 - ends
    assert ours["bytes"] == theirs["bytes"] == n_bytes > 0, "bytes of tokens are byte tokens, less ends of text"
    assert ours["tokens"] == n_bytes + ends
    assert theirs["tokens"] == len(tokens) - 1 < ours["tokens"]
    assert ours["bpb"] == pytest.approx(theirs["bpb"], rel=1e-12)
    assert ours["bpb"] == pytest.approx((0.7 * n_bytes + 3 * ends) / n_bytes / math.log(2), rel=1e-12)

    uniform = measured(mine, len(spelt) - 1, torch.full((257,), math.log(256), dtype=torch.float64))
    assert uniform["bpb"] == pytest.approx(8 * (1 + ends / n_bytes), rel=1e-12), "ends are paid for, and no bytes"


def test_bits_per_byte_measure_the_same_thing(source: ShardFiles, root: Path) -> None:
    check_ruler(source, root)


def test_real_text(shards: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's tokens: the bytes are tiktoken's, the documents those of the file, the ruler one."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shards / "tiktoken-cache"))
    files = shards / "shards"
    write_shard(tmp_path / "t.bin", range(50257), 50257)  # every id once
    source = ShardFiles([f"{tmp_path}/t.bin"], [f"{files}/webtext_val_*.bin"], GPT2Tokenizer())
    check_ruler(source, root)
    encoding, mine = source.tokenizer._encoding, AsBytes(source, str(root))
    assert bytes(read(mine.train_files()[0])[:-1]) == encoding.decode_bytes(range(50256))
    tokens, spelt = (np.array(read(s.val_files()[0], s.tokenizer.vocab_size)) for s in (source, mine))
    edges, ends = (tokens == 50256).nonzero()[0], (spelt == 256).nonzero()[0]
    assert len(edges) == len(ends) == 407
    for one, text in zip(np.split(tokens, edges)[1:], np.split(spelt, ends)[1:], strict=True):
        assert bytes(text[1:].astype(np.uint8)) == source.tokenizer.decode(one[1:].tolist()).encode()


def test_the_data_module_over_it(source: ShardFiles, root: Path) -> None:
    data = TokenData(AsBytes(source, str(root)), context=64, batch_size=4, device_batch_size=2, val_tokens=1000)
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer.vocab_size == 257
    assert data.train_shards.n_tokens == sum(len(naive(read(p, 300), source.tokenizer)) for p in source.train_files())


# ---------------------------------------------------------------------- the overlay


def test_the_overlay_reads_as_much_text_a_step(capsys: pytest.CaptureFixture) -> None:
    words = ["--config", str(CONFIGS / "blagpt.yaml"), "--config", str(CONFIGS / "data" / "bytes.yaml")]
    with pytest.raises(SystemExit) as done:
        run("fit", [*words, "--print_config"])
    assert not done.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    tokens, spelt = yaml.safe_load((CONFIGS / "blagpt.yaml").read_text())["data"], config["data"]
    model = config["model"]["init_args"]
    assert model["vocab_size"] % 64 == 0
    assert model["vocab_size"] >= ByteTokenizer.vocab_size
    assert spelt["source"]["class_path"].endswith("AsBytes")
    origin = spelt["source"]["init_args"]["source"]
    assert origin["class_path"].endswith(f".{tokens['source']}"), "the same text"
    assert origin["init_args"]["shards"] == 103
    for size in (lambda d: d["batch_size"] * d["context"], lambda d: d["val_tokens"]):
        assert 3.9 < size(spelt) / size(tokens) < 4.5, "bytes a token"
    assert spelt["device_batch_size"] * spelt["context"] == tokens["device_batch_size"] * tokens["context"]
