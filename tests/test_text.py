"""The text: reading it, fetching it, characters to ids and back."""

import http.server
import os
import signal
import socket
import threading
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from conftest import TINY, words
from hypothesis import given
from hypothesis import strategies as st

import gpt

TEXT = words(300_000)  # more than socket buffers hold, so that half of it is half of a download
MANUAL = "\n".join(topics.values())
ANY_TEXT = st.text(st.characters(exclude_categories=()), min_size=1)  # lone surrogates as well


# Characters and ids.
@given(ANY_TEXT, st.data())
def test_ids_give_back_any_text_of_the_vocabulary(text, data):
    vocab = "".join(sorted(set(text)))
    another = data.draw(st.text(st.sampled_from(vocab), min_size=1))
    for string in (text, another):
        ids = gpt.encode(string, vocab)
        assert ids.dtype == torch.int64 and ids.shape == (len(string),)
        assert "".join(vocab[i] for i in ids) == string


@given(ANY_TEXT, ANY_TEXT)
def test_encode_refuses_a_character_that_the_vocabulary_lacks(text, known):
    vocab = "".join(sorted(set(known)))
    if set(text) <= set(known):
        assert "".join(vocab[i] for i in gpt.encode(text, vocab)) == text
    else:
        with pytest.raises(ValueError):
            gpt.encode(text, vocab)


# Files.
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_a_file_is_read_without_a_bom_and_every_line_end_is_a_new_line(bom, text):
    exact = "\ttab\0 CRLF\r\nCR\rLF\n\n é é 中文 🙂 \ufeff end\r\r\n"
    Path("input.txt").write_bytes(bom + exact.encode())
    assert gpt.read_text() == "\ttab\0 CRLF\nCR\nLF\n\n é é 中文 🙂 \ufeff end\n\n"


def test_the_same_text_with_other_line_ends_is_the_same_text_in_the_record(text):
    Path("mine.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    here = gpt.main(**TINY)[2]
    there = gpt.main(**TINY, DATA="mine.txt")[2]
    assert here["data"] == there["data"] and here["curve"] == there["curve"]


def test_the_last_tenth_is_the_validation_split(text, monkeypatch):
    lengths = []

    def train(model, train_ids, val_ids, run):
        lengths.extend([len(train_ids), len(val_ids)])
        assert torch.cat([train_ids, val_ids]).tolist() == [run["vocab"].index(c) for c in text]
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt, "train", train)
    with pytest.raises(KeyboardInterrupt):
        gpt.main(**TINY)
    assert lengths == [1800, 200]


@pytest.mark.parametrize("content", [b"", "é".encode("latin-1"), "folder", "dangling"])
def test_a_bad_input_txt_is_an_error_and_is_not_replaced(content, text, monkeypatch, capsys):
    path = Path("input.txt")
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "dangling":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(content)
    before = path.lstat()
    monkeypatch.setattr(gpt, "URL", "http://127.0.0.1:9/")
    with pytest.raises(gpt.BadInput, match="DATA='input.txt'"):
        gpt.main(**TINY)
    assert path.lstat() == before and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["inptu.txt", "./input.txt", "folder/input.txt", "Input.txt"])
def test_only_the_name_input_txt_is_fetched(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fetched = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: fetched.append(1))
    with pytest.raises(gpt.BadInput, match=name):
        gpt.main(**TINY, DATA=name)
    assert fetched == [] and not Path(name).exists() and capsys.readouterr() == ("", "")


# The fetch. A server on this machine plays every part.
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = TEXT.encode()
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/closed":
            self.wfile.write(body[: len(body) // 2])
        elif self.path == "/hangs":
            self.wfile.write(body[: len(body) // 2])
            self.server.halfway()
            self.server.over.wait(5)
        elif self.path == "/good":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server in a thread; its address is server.url."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.halfway = lambda: None
        server.over = threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def stands_in(tmp_path, monkeypatch, capsys):
    """stands_in() reads input.txt where it is not there and cannot be fetched: the manual, a line
    that says so, no file; returns that line."""
    monkeypatch.chdir(tmp_path)

    def read():
        assert gpt.read_text() == MANUAL
        out, err = capsys.readouterr()
        assert err == "" and out.count("\n") == 1 and os.listdir() == []
        assert gpt.URL in out and "input.txt" in out and "manual" in out
        return out

    return read


def test_a_good_fetch_is_put_in_place_byte_for_byte(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "URL", server.url + "/good")
    assert gpt.read_text() == TEXT
    assert Path("input.txt").read_bytes() == TEXT.encode()
    assert os.listdir() == ["input.txt"] and capsys.readouterr() == ("", "")
    monkeypatch.setattr(gpt, "URL", server.url + "/missing")
    assert gpt.read_text() == TEXT  # it is not fetched again


@pytest.mark.parametrize(
    "path, says",
    [
        ("closed", ""),
        ("missing", "404"),
        ("hangs", "timed out"),
    ],
)
def test_after_a_bad_fetch_the_manual_stands_in(path, says, server, stands_in, monkeypatch):
    real = urllib.request.urlopen
    limits = []

    def urlopen(url, timeout):
        limits.append(timeout)
        return real(url, timeout=0.2)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(gpt, "URL", f"{server.url}/{path}")
    assert says in stands_in()
    assert 1 <= limits[0] <= 30 and socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    "name, error",
    [
        ("getaddrinfo", socket.gaierror(-2, "Name or service not known")),
        ("create_connection", OSError(101, "Network is unreachable")),
    ],
)
def test_without_a_name_or_a_network_the_manual_stands_in(name, error, stands_in, monkeypatch):
    def fail(*_, **__):
        raise error

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(socket, name, fail)
    monkeypatch.setattr(gpt, "URL", "http://nowhere.invalid/")
    assert error.strerror in stands_in()


def test_a_run_without_a_network_is_a_run_of_the_manual(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:  # nobody listens at this port
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(gpt, "URL", f"http://127.0.0.1:{unused.getsockname()[1]}/good")
        _, vocab, run = gpt.main(**TINY)
    out, err = capsys.readouterr()
    first = out.splitlines()[0]
    assert err == "" and gpt.URL in first and "refused" in first and "input.txt" in first
    assert len(MANUAL) > 300_000 and vocab == "".join(sorted(set(MANUAL)))
    assert run["data"] == f"{zlib.crc32(MANUAL.encode()):08x}"
    assert not Path("input.txt").exists()


def test_half_a_text_is_never_in_place(server, tmp_path, monkeypatch, capsys):
    """A disk is full after nine bytes."""
    real = Path.write_bytes

    def fill(path, data):
        real(path, data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "URL", server.url + "/good")
    monkeypatch.setattr(Path, "write_bytes", fill)
    assert gpt.read_text() == MANUAL and "No space" in capsys.readouterr().out
    assert not Path("input.txt").exists()


def test_two_first_runs_in_one_folder_both_read_the_whole_text(server, tmp_path, monkeypatch):
    """Both fetch it before either has put it in place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "URL", server.url + "/good")
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # two threads play two processes
    together = threading.Barrier(2)
    real = Path.write_bytes

    def write(path, data):
        real(path, data)
        together.wait(5)

    monkeypatch.setattr(Path, "write_bytes", write)
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda _: gpt.read_text(), range(2)))
    assert texts == [TEXT, TEXT] and os.listdir() == ["input.txt"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_in_the_middle_of_the_download_leaves_no_file(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "URL", server.url + "/hangs")
    server.halfway = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        gpt.read_text()
    assert os.listdir() == []


def test_the_address_is_that_of_tiny_shakespeare():
    assert gpt.URL.startswith("https://") and gpt.URL.endswith("/tinyshakespeare/input.txt")
