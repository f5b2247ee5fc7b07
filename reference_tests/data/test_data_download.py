"""Downloading and unpacking, against a server on this machine that can misbehave."""

import contextlib
import errno
import hashlib
import http.server
import io
import os
import shutil
import stat
import threading
import zipfile
from types import SimpleNamespace

import pytest

from recsys.data import download as download_module
from recsys.data import known, locate
from recsys.data.download import download
from recsys.data.errors import DataError
from recsys.data.load import load
from recsys.data.unpack import unpack

BODY = bytes(range(256)) * 4000  # about 1 MB
MD5 = hashlib.md5(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A server of `files`. Options: `ranges` (honours Range), `cut` (bytes after which the
    connection closes), `length` (what Content-Length claims), `status` (an error). `asked` holds
    the path and Range header of each request.
    """
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = SimpleNamespace(
        files={"/file": BODY}, ranges=True, cut=None, length=None, status=None, asked=[], shift=0
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked = self.headers.get("Range")
            state.asked.append((self.path, asked))
            if state.status or self.path not in state.files:
                return self.send_error(state.status or 404)
            body = state.files[self.path]
            begin = int(asked[6:-1]) if asked and state.ranges else 0
            if begin and begin >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if begin else 200)
            if begin:
                begin += state.shift  # a server that answers with another range
                span = f"bytes {begin}-{len(body) - 1}/{len(body)}"
                self.send_header("Content-Range", span)
            self.send_header("Content-Length", str(state.length or len(body) - begin))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client may have had enough
                self.wfile.write(body[begin:][: state.cut])

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def fails(call, *parts):
    with pytest.raises(DataError) as error:
        call()
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_a_file_arrives_whole_and_with_progress(server, tmp_path):
    seen = []
    target = download(f"{server.url}/file", tmp_path / "new" / "file.bin", md5=MD5,
                      progress=lambda *step: seen.append(step))  # fmt: skip
    assert target == tmp_path / "new" / "file.bin" and target.read_bytes() == BODY
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]  # no part is left
    assert seen[-1] == ("file.bin", len(BODY), len(BODY))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert server.asked == [("/file", None)]


def test_a_broken_download_goes_on_where_it_broke(server, tmp_path):
    target, part = tmp_path / "file", tmp_path / "file.part"
    server.cut = 300_000
    fails(lambda: download(f"{server.url}/file", target, md5=MD5),
          "connection broke", "300,000 of 1,024,000", "Run again")  # fmt: skip
    assert part.read_bytes() == BODY[:300_000] and not target.exists()
    fails(lambda: download(f"{server.url}/file", target, md5=MD5), "600,000 of 1,024,000")
    server.cut = None
    seen = []
    download(f"{server.url}/file", target, md5=MD5, progress=lambda *step: seen.append(step))
    assert target.read_bytes() == BODY and not part.exists()
    assert [asked for _, asked in server.asked] == [None, "bytes=300000-", "bytes=600000-"]
    assert seen[0][1] > 600_000 and seen[0][2] == len(BODY)


def test_a_server_without_ranges_sends_it_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    server.ranges = False
    seen = []
    download(f"{server.url}/file", tmp_path / "file", progress=lambda *step: seen.append(step))
    assert (tmp_path / "file").read_bytes() == BODY and seen[-1][1:] == (len(BODY), len(BODY))


def test_another_range_than_asked_for_is_not_appended(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    server.shift = 500
    assert download(f"{server.url}/file", tmp_path / "file").read_bytes() == BODY
    assert server.asked == [("/file", "bytes=1000-"), ("/file", None)]


@pytest.mark.parametrize("part", [BODY, BODY + b"more"])
def test_a_part_that_is_whole_or_too_long(server, tmp_path, part):
    (tmp_path / "file.part").write_bytes(part)
    assert download(f"{server.url}/file", tmp_path / "file").read_bytes() == BODY
    assert len(server.asked) == (1 if part == BODY else 2)


def test_a_part_of_another_version_is_thrown_away(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    assert download(f"{server.url}/file", tmp_path / "file", md5=MD5).read_bytes() == BODY
    assert [asked for _, asked in server.asked] == ["bytes=1000-", None]


def test_a_wrong_checksum(server, tmp_path):
    fails(lambda: download(f"{server.url}/file", tmp_path / "file", md5="0" * 32), "checksum")
    assert list(tmp_path.iterdir()) == []  # so that the next call starts afresh


def test_a_content_length_that_is_too_small_is_caught_by_the_checksum(server, tmp_path):
    server.length = 1000
    fails(lambda: download(f"{server.url}/file", tmp_path / "file", md5=MD5), "checksum")


def test_a_content_length_that_is_too_large_is_a_broken_connection(server, tmp_path):
    server.length = len(BODY) + 10
    fails(lambda: download(f"{server.url}/file", tmp_path / "file", md5=MD5), "connection broke")
    server.length = None
    assert download(f"{server.url}/file", tmp_path / "file", md5=MD5).read_bytes() == BODY


@pytest.mark.parametrize(("status", "words"), [(404, "HTTP 404"), (503, "HTTP 503")])
def test_a_refusal(server, tmp_path, status, words):
    server.status = status
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    fails(lambda: download(f"{server.url}/file", tmp_path / "file", md5=MD5), words, "/file")
    assert (tmp_path / "file.part").exists()  # the part is still good


def test_no_network(tmp_path):
    fails(lambda: download("http://127.0.0.1:9/file", tmp_path / "file"), "cannot be reached")


def test_a_silent_server(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(download_module, "TIMEOUT", 0.2)
    monkeypatch.delenv("http_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file"
        fails(lambda: download(url, tmp_path / "file"), "timed out", url)


def test_a_full_disk(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        fails(
            lambda: download(f"{server.url}/file", tmp_path / "file"), "disk is full", "1,000 are"
        )

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download_module, "_check_space", full)
    fails(lambda: download(f"{server.url}/file", tmp_path / "file"), "disk is full")


def test_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    fails(lambda: download(f"{server.url}/file", tmp_path / "file" / "x"), "cannot be written")


def archive(members, path=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    if path is not None:
        path.write_bytes(buffer.getvalue())
        return path
    return buffer.getvalue()


def test_unpack_leaves_out_the_single_root(tmp_path):
    good = archive({"set/": "", "set/a.txt": "1", "set/deep/b.txt": "2"}, tmp_path / "good.zip")
    folder = unpack(good, tmp_path / "out" / "set")
    assert (folder / "a.txt").read_text() == "1" and (folder / "deep" / "b.txt").read_text() == "2"
    flat = archive({"a.txt": "1", "b.txt": "2"}, tmp_path / "flat.zip")
    assert sorted(p.name for p in unpack(flat, tmp_path / "flat").iterdir()) == ["a.txt", "b.txt"]
    assert unpack(tmp_path / "not read.zip", folder) == folder  # what is there is taken as it is
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat", "flat.zip", "good.zip", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["set"]  # no temporary folder is left


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


EVIL = {
    "parent": ("set/../../evil", "outside its folder"),
    "absolute": ("/tmp/evil", "outside its folder"),
    "drive": ("C:/evil", "outside its folder"),
    "backslash": ("..\\evil", "outside its folder"),
    "link": (link("set/evil"), "link"),
}


@pytest.mark.parametrize("kind", EVIL)
def test_evil_members_are_refused_before_anything_is_written(tmp_path, kind):
    name, words = EVIL[kind]
    if isinstance(name, str):
        info = zipfile.ZipInfo("x")
        info.filename = name  # past the clean-up of writestr
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("set/good", "1")
            file.writestr(info, "2")
        path = tmp_path / "evil.zip"
        path.write_bytes(buffer.getvalue())
    else:
        path = archive({"set/good": "1", name: "/etc/passwd"}, tmp_path / "evil.zip")
    fails(lambda: unpack(path, tmp_path / "in" / "out"), words, "refused")
    assert list((tmp_path / "in").iterdir()) == []


def test_a_bomb_is_refused(tmp_path):
    bomb = archive({"zeros": b"\0" * 3_000_000}, tmp_path / "bomb.zip")
    assert bomb.stat().st_size < 10_000
    fails(lambda: unpack(bomb, tmp_path / "in" / "out", limit=2_000_000), "more than 2 MB")
    two = archive({"a": b"\0" * 1_500_000, "b": b"\0" * 1_500_000}, tmp_path / "two.zip")
    fails(lambda: unpack(two, tmp_path / "in" / "out", limit=2_000_000), "more than 2 MB")
    lying = bytearray(bomb.read_bytes())  # claims to unpack to 1,000 bytes
    at = lying.rindex(b"PK\x01\x02")
    lying[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    bomb.write_bytes(lying)
    fails(lambda: unpack(bomb, tmp_path / "in" / "out", limit=2_000_000), "not a whole zip file")
    many = archive({f"{i}": "" for i in range(1_001)}, tmp_path / "many.zip")
    fails(lambda: unpack(many, tmp_path / "in" / "out"), "1001 files")
    assert list((tmp_path / "in").iterdir()) == []


def test_a_damaged_archive(tmp_path):
    whole = archive({"a": os.urandom(5000)}, tmp_path / "a.zip").read_bytes()
    for content in (whole[:3000], whole[:1000] + b"?" + whole[1001:], b""):
        (tmp_path / "a.zip").write_bytes(content)
        fails(lambda: unpack(tmp_path / "a.zip", tmp_path / "in" / "out"), "not a whole zip file")
    assert list((tmp_path / "in").iterdir()) == []


FILES = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,10,4.5,900000000\n2,10,3.0,900000001\n",
    "movies.csv": "movieId,title,genres\n10,A (1999),Drama\n",
}


@pytest.fixture
def publisher(server, tmp_path, monkeypatch):
    """A published set of two ratings, called ml-latest-small, on the server."""
    monkeypatch.setattr(locate, "BASE_URL", f"{server.url}/")
    monkeypatch.setenv("KATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KATA_DATA", raising=False)
    monkeypatch.setitem(known.KNOWN, "ml-latest-small", known.Known(2, 2, 1, None))
    body = archive({f"ml-latest-small/{name}": text for name, text in FILES.items()})
    md5 = hashlib.md5(body).hexdigest()
    sums = f"MD5 (ml-latest-small.zip) = {md5}\n".encode()
    server.files = {"/ml-latest-small.zip": body, "/ml-latest-small.zip.md5": sums}
    return server


def test_a_known_set_is_fetched_once(publisher, tmp_path):
    seen = []
    data = load("ml-latest-small", progress=lambda *step: seen.append(step))
    assert (data.name, data.num_interactions, data.titles) == ("ml-latest-small", 2, ["A (1999)"])
    assert {what for what, _, _ in seen} == {"ml-latest-small.zip"}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ml-latest-small"]
    asked = len(publisher.asked)
    load("ml-latest-small")
    assert len(publisher.asked) == asked == 2


def test_the_published_checksum_is_enforced(publisher, tmp_path):
    for text in (b"0" * 32 + b"  ml-latest-small.zip\n", b"<html>no sum here</html>"):
        publisher.files["/ml-latest-small.zip.md5"] = text
        fails(lambda: load("ml-latest-small"), "checksum", "KATA_DATA")
        assert list((tmp_path / "cache").iterdir()) == []


def test_a_checksum_that_is_built_in_is_not_asked_for(publisher, monkeypatch):
    md5 = hashlib.md5(publisher.files["/ml-latest-small.zip"]).hexdigest()
    monkeypatch.setitem(known.KNOWN, "ml-latest-small", known.Known(2, 2, 1, md5))
    del publisher.files["/ml-latest-small.zip.md5"]
    assert load("ml-latest-small").num_users == 2
    assert [path for path, _ in publisher.asked] == ["/ml-latest-small.zip"]


def test_a_known_set_resumes(publisher):
    publisher.cut = 100
    fails(lambda: load("ml-latest-small"), "connection broke")
    publisher.cut = None
    load("ml-latest-small")
    assert publisher.asked[-1] == ("/ml-latest-small.zip", "bytes=100-")


def test_an_interrupted_unpacking_is_taken_up_without_a_download(publisher, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(locate, "unpack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("ml-latest-small")
    asked = len(publisher.asked)
    assert load("ml-latest-small").num_users == 2 and len(publisher.asked) == asked


def test_a_damaged_archive_in_the_cache_is_not_kept(publisher, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ml-latest-small.zip").write_bytes(b"PK no")
    fails(lambda: load("ml-latest-small"), "not a whole zip file")
    assert load("ml-latest-small").num_users == 2


def test_without_network_the_ways_out_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(locate, "BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("KATA_CACHE", str(tmp_path))
    monkeypatch.setenv("KATA_DATA", str(tmp_path / "nowhere"))
    fails(lambda: load("ml-1m"), "cannot be reached", "KATA_DATA", "synthetic")
