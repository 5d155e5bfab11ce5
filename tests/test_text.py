"""The text: reading, fetching, characters to ids and back, batches."""

import hashlib
import http.server
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, words
from hypothesis import given
from hypothesis import strategies as st

import gpt

TEXT = words(300_000)  # more than socket buffers hold, so that half of it is half of a download
EVERYTHING = st.text(st.characters(exclude_categories=()), min_size=1)  # lone surrogates as well


# Characters and ids.
@given(EVERYTHING, st.data())
def test_ids_give_the_text_back_for_any_text_of_the_vocabulary(text, data):
    vocab = "".join(sorted(set(text)))
    again = data.draw(st.text(st.sampled_from(vocab)))
    for s in (text, again):
        ids = gpt.encode(s, vocab)
        assert ids.dtype == torch.int64 and ids.shape == (len(s),)
        assert "".join(vocab[i] for i in ids) == s


def test_ids_are_places_in_the_vocabulary():
    text = "\0a\r\né é中文🙂\U0010ffff\ud800\r\n"
    vocab = "".join(sorted(set(text)))
    assert gpt.encode(text, vocab).tolist() == [vocab.index(c) for c in text]


@given(EVERYTHING, EVERYTHING)
def test_encode_names_every_character_that_is_not_there(text, known):
    vocab, strange = "".join(sorted(set(known))), sorted(set(text) - set(known))
    if strange:
        with pytest.raises(ValueError) as error:
            gpt.encode(text, vocab)
        assert all(repr(c) in str(error.value) for c in strange[:20])
    else:
        assert "".join(vocab[i] for i in gpt.encode(text, vocab)) == text


# Batches.
def test_batches_are_consecutive_pieces_and_reach_both_ends(flags):
    flags(BLOCK_SIZE=3, BATCH_SIZE=50)
    x, y = gpt.batch(100 + torch.arange(10), torch.Generator().manual_seed(1))
    assert x.shape == y.shape == (50, 3)
    assert (x == x[:, :1] + torch.arange(3)).all() and (y == x + 1).all()
    assert set(x[:, 0].tolist()) == set(range(100, 107))  # the last y is then 109, the last id


def test_the_shortest_text_has_one_window(flags):
    flags(BLOCK_SIZE=3, BATCH_SIZE=5)
    x, y = gpt.batch(torch.arange(4), torch.Generator().manual_seed(1))
    assert x.tolist() == [[0, 1, 2]] * 5 and y.tolist() == [[1, 2, 3]] * 5


def test_batches_have_a_generator_of_their_own(flags):
    flags()
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        seen.append(gpt.batch(torch.arange(1000), torch.Generator().manual_seed(7))[0])
        assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(*seen)
    other = gpt.batch(torch.arange(1000), torch.Generator().manual_seed(8))[0]
    assert not torch.equal(seen[0], other)


# Files.
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_a_file_is_read_as_it_is_but_for_a_bom(bom, text):
    exact = "\ttab\0 CRLF\r\nCR\rLF\n é é 中文 🙂 \ufeff end "
    Path("input.txt").write_bytes(bom + exact.encode())
    assert gpt.read_text() == exact


@pytest.mark.parametrize("content", [None, b"", "é".encode("latin-1"), "folder", "dangling"])
def test_a_bad_input_txt_is_an_error_and_is_not_replaced(content, text, monkeypatch, capsys):
    path = Path("input.txt")
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "dangling":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(content or b"")
    before = path.lstat()
    monkeypatch.setattr(gpt, "URL", "http://127.0.0.1:9/")
    with pytest.raises(ValueError, match="--data input.txt"):
        gpt.main({})
    assert path.lstat() == before and list(Path().iterdir()) == [path]
    assert capsys.readouterr().out == ""


def test_a_file_named_by_data_is_an_error_when_missing(text, monkeypatch):
    fetched = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: fetched.append(1))
    vars(gpt)["DATA"] = "mine.txt"
    with pytest.raises(ValueError, match="--data mine.txt"):
        gpt.read_text()
    assert not fetched and not Path("mine.txt").exists()


# The fetch. A server on this machine plays every part.
@pytest.fixture(autouse=True)
def timeout():
    """What the fetch sets for the whole process is put back."""
    yield
    socket.setdefaulttimeout(None)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = TEXT.encode()
        self.send_response(404 if self.path == "/missing" else 200)
        if self.path not in ("/short", "/long"):  # then nothing says how long the body is
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/other":
            self.wfile.write(body[:-1] + b"!")
        elif self.path == "/long":
            self.wfile.write(body + b"!")
        elif self.path in ("/short", "/closed"):
            self.wfile.write(body[: len(body) // 2])
        elif self.path == "/hangs":
            self.wfile.write(body[: len(body) // 2])
            self.server.halfway.set()
            self.server.over.wait(5)
        elif self.path == "/good":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server in a thread; its address is server.url."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.halfway, server.over = threading.Event(), threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def refused(text, capsys):
    """refused() wants the text in an empty folder: an error that names it, no file; its words."""

    def check():
        Path("input.txt").unlink()
        with pytest.raises(
            ValueError, match="--data input.txt: .+; give a UTF-8 text file"
        ) as error:
            gpt.read_text()
        assert capsys.readouterr() == ("", "") and not list(Path().iterdir())
        return str(error.value)

    return check


def test_a_good_fetch_is_put_in_place_byte_for_byte(server, text, monkeypatch, capsys):
    Path("input.txt").unlink()
    monkeypatch.setattr(gpt, "URL", server.url + "/good")
    assert gpt.read_text() == TEXT
    assert Path("input.txt").read_bytes() == TEXT.encode()
    assert list(Path().iterdir()) == [Path("input.txt")] and capsys.readouterr().out == ""
    monkeypatch.setattr(gpt, "URL", server.url + "/missing")
    assert gpt.read_text() == TEXT  # it is not fetched again


@pytest.mark.parametrize(
    "path, says",
    [
        ("short", "hash"),
        ("long", "hash"),
        ("other", "hash"),
        ("closed", ""),
        ("missing", "404"),
        ("hangs", "timed out"),
    ],
)
def test_a_bad_fetch_is_an_error_and_leaves_no_file(path, says, server, refused, monkeypatch):
    limit = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: limit(min(s, 0.2)))
    monkeypatch.setattr(gpt, "URL", f"{server.url}/{path}")
    assert says in refused()


def test_a_closed_port_is_no_network(refused, monkeypatch):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(gpt, "URL", f"http://127.0.0.1:{unused.getsockname()[1]}/good")
        assert "refused" in refused()


@pytest.mark.parametrize(
    "name, error",
    [
        ("getaddrinfo", socket.gaierror(-2, "Name or service not known")),
        ("create_connection", OSError(101, "Network is unreachable")),
    ],
)
def test_no_name_and_no_network(name, error, refused, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(socket, name, fail)
    monkeypatch.setattr(gpt, "URL", "http://nowhere.invalid/")
    assert error.strerror in refused()


def test_the_fetch_gives_up_on_a_server_that_hangs_in_half_a_minute(refused, monkeypatch):
    monkeypatch.setattr(gpt, "URL", "http://127.0.0.1:9/")
    refused()
    assert 1 <= socket.getdefaulttimeout() <= 30


def test_the_real_address_and_checksum_are_the_ones_in_the_design():
    assert gpt.URL.startswith("https://") and gpt.URL.endswith("/tinyshakespeare/input.txt")
    local = SCRIPT.with_name("input.txt")
    if not local.exists():
        pytest.skip("no input.txt here")
    assert hashlib.sha256(local.read_bytes()).hexdigest() == gpt.SHA256


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_download_interrupted_half_way_leaves_no_input_txt(number, server, tmp_path):
    source = SCRIPT.read_text("utf-8")
    script = tmp_path / "gpt.py"  # a copy, with the server's address
    script.write_text(source.replace(gpt.URL, server.url + "/hangs"), "utf-8")
    run = subprocess.Popen([sys.executable, script], cwd=tmp_path, stderr=subprocess.PIPE)
    assert server.halfway.wait(60)
    run.send_signal(number)
    assert run.communicate()[1] == b"" and run.returncode == -number
    assert not (tmp_path / "input.txt").exists()
