"""FineWeb's download, against a hub on 127.0.0.1 that cuts, damages and forgets files."""

import hashlib
import os
import re
import runpy
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from blagpt_pl.data import FineWeb, FineWeb10B, GPT2Tokenizer, write_shard
from blagpt_pl.errors import ConfigError, DataError

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAIN_1 = "fineweb_train_000001.bin"


class Hub:
    """Enough of the Hugging Face hub to download from: HEAD and GET of `resolve` addresses."""

    def __init__(self, folder: Path) -> None:
        names = ["fineweb_val_000000.bin", TRAIN_1, "fineweb_train_000002.bin"]
        shards = [write_shard(folder / name, range(i, 2000 + i), 50257) for i, name in enumerate(names)]
        self.files = {shard.path.name: shard.path.read_bytes() for shard in shards}
        self.sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        self.served = dict(self.files)  # what a GET sends, which a test may change
        self.length = {name: len(content) for name, content in self.files.items()}  # what the headers claim
        self.gets: Counter[str] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: bool) -> None:
                found = re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/\w+/(.*)", self.path)
                name = found[1] if found else ""
                if name not in hub.files:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("X-Repo-Commit", "c" * 40)
                self.send_header("ETag", f'"{hub.sha256[name]}"')
                self.send_header("Content-Length", str(hub.length[name]))
                self.end_headers()
                if body:
                    hub.gets[name] += 1
                    self.wfile.write(hub.served[name])
                    self.close_connection = True

            def do_GET(self) -> None:
                self.answer(True)

            def do_HEAD(self) -> None:
                self.answer(False)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, file_download

    hub = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)  # its pause between attempts
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def listing(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name != ".lock")


def test_only_what_is_missing_is_fetched(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "data"
    source = FineWeb10B(str(root), shards=2)
    source.fetch()
    assert listing(root) == sorted(hub.files)
    assert all((root / name).read_bytes() == content for name, content in hub.files.items())
    (root / TRAIN_1).write_bytes(b"cut")  # a damaged file under its final name is replaced
    source.fetch()
    source.fetch()
    assert (root / TRAIN_1).read_bytes() == hub.files[TRAIN_1]
    assert hub.gets == Counter({"fineweb_val_000000.bin": 1, TRAIN_1: 2, "fineweb_train_000002.bin": 1})
    assert [path.name for path in source.train_files()] == [TRAIN_1, "fineweb_train_000002.bin"]


def spoil_cut(hub: Hub) -> None:
    hub.served[TRAIN_1] = hub.files[TRAIN_1][:2500]  # the connection closes half-way


def spoil_short(hub: Hub) -> None:
    spoil_cut(hub)
    hub.length[TRAIN_1] = 2500  # the hub's own copy is short, and says so


def spoil_bytes(hub: Hub) -> None:
    hub.served[TRAIN_1] = hub.files[TRAIN_1][:-1] + b"\xff"  # right size, one wrong byte


def spoil_header(hub: Hub) -> None:
    hub.served[TRAIN_1] = bytes(len(hub.files[TRAIN_1]))
    hub.sha256[TRAIN_1] = "not-a-sha256"


def spoil_absent(hub: Hub) -> None:
    del hub.files[TRAIN_1]


def spoil_server(hub: Hub) -> None:
    hub.server.shutdown()
    hub.server.server_close()


@pytest.mark.parametrize(
    ("spoil", "says", "left"),
    [
        (spoil_cut, "expected it from http://127.0.0.1", ["fineweb_val_000000.bin"]),
        (spoil_short, "sha256 ", ["fineweb_val_000000.bin"]),
        (spoil_bytes, "damaged on the way", ["fineweb_val_000000.bin"]),
        (spoil_header, "magic 0", ["fineweb_val_000000.bin"]),
        (spoil_absent, "not on the hub", ["fineweb_val_000000.bin"]),
        (spoil_server, "fix: run again with a network", []),
    ],
)
def test_no_bad_file_gets_its_final_name(hub: Hub, tmp_path: Path, spoil, says: str, left: list[str]) -> None:
    spoil(hub)
    with pytest.raises(DataError) as error:
        FineWeb10B(str(tmp_path / "data"), shards=2).fetch()
    message = str(error.value)
    assert says in message and "\n" not in message and "hf_secret" not in message
    assert (TRAIN_1 if left else "fineweb_val_000000.bin") in message
    assert listing(tmp_path / "data") == left


def test_two_at_once_fetch_each_file_once(hub: Hub, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: FineWeb10B(str(tmp_path / "data"), shards=2).fetch(), range(2)))
    assert listing(tmp_path / "data") == sorted(hub.files)
    assert set(hub.gets.values()) == {1}


def test_a_killed_download_leaves_no_trace_for_the_next(hub: Hub, tmp_path: Path) -> None:
    left = tmp_path / "data/.download/.cache/huggingface/download/x.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    FineWeb10B(str(tmp_path / "data"), shards=1).fetch()
    assert listing(tmp_path / "data") == [TRAIN_1, "fineweb_val_000000.bin"]


def test_the_number_of_shards_and_the_folder_are_checked(tmp_path: Path) -> None:
    for shards in (0, 104):
        with pytest.raises(ConfigError, match=rf"shards: {shards} \(expected 1 to 103\)"):
            FineWeb10B(shards=shards)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.source\.init_args\.root"):
        FineWeb10B(str(tmp_path / "file")).fetch()


def test_fineweb_is_token_data() -> None:
    data = FineWeb(context=1024, batch_size=512, device_batch_size=64, val_tokens=10_485_760, shards=9)
    assert len(data.source.train_files()) == 9 and isinstance(data.tokenizer, GPT2Tokenizer)
    assert data.tokens_per_step == 524_288 and data.accumulation == 8


def test_the_script(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed's entry point lands its files beside itself, wherever it is run from."""
    script = tmp_path / "data/fineweb10B_cached.py"
    script.parent.mkdir()
    repository = Path(__file__).resolve().parents[2]
    script.write_bytes((repository / "data/fineweb10B_cached.py").read_bytes())
    environment = os.environ | {"PYTHONPATH": str(repository), "HF_ENDPOINT": hub.url}

    command = [sys.executable, str(script), "2"]
    done = subprocess.run(command, check=False, cwd="/", env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert listing(script.parent / "fineweb10B") == sorted(hub.files)

    monkeypatch.setattr(sys, "path", sys.path.copy())
    main = runpy.run_path(str(script))["main"]
    for argument, says in (("104", "error: data.source.init_args.shards: 104 "), ("two", "error: N: 'two' ")):
        assert main([argument]) == 2
        assert capsys.readouterr().err.startswith(says)
