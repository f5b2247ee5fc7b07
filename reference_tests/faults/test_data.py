"""Files, archives and downloads that are not what they should be: loaded right, or refused.

Whether a file was loaded right is decided by a second, slow reader that shares nothing with the
loaders. A refusal names the file, the line (if it is about one) and what was expected.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import re
import socket
import subprocess
import sys
import threading
import zipfile
from hashlib import md5

import pytest

from harness.paths import ROOT
from recsys.data import download as download_module
from recsys.data import known
from recsys.data.download import download
from recsys.data.errors import DataError
from recsys.data.load import load
from recsys.data.unpack import unpack

WORDS = "Heat Amélie Œuvre Alien 七人の侍 Up A|B".split()
GENRES = ("unknown", "Action", "Drama", "Film-Noir")


def make(kind: str, rng: random.Random, users=9, items=12, ratings=40) -> dict[str, bytes]:
    """A small data set in one of the three formats."""
    pairs = rng.sample([(u, i) for u in range(users) for i in range(items)], ratings)
    rows = [(7 * u + 1, 11 * i + 3, rng.randint(1, 5), 978_300_000 + rng.randint(0, 99_999))
            for u, i in pairs]  # fmt: skip
    words = [word.encode("latin-1", "replace").decode("latin-1") for word in WORDS]
    films = [(11 * i + 3, f"{rng.choice(words)} {i} ({1950 + i})") for i in range(items)]
    if kind == "100k":
        flags = ["|".join(str(int(g == i % len(GENRES))) for g in range(len(GENRES)))
                 for i in range(items)]  # fmt: skip
        text = {
            "u.data": ["\t".join(map(str, row)) for row in rows],
            "u.item": [f"{i}|{t.replace('|', '/')}|01-Jan-1995||http://x|{f}"
                       for (i, t), f in zip(films, flags, strict=True)],
            "u.genre": [f"{name}|{i}" for i, name in enumerate(GENRES)],
            "u.user": [f"{7 * u + 1}|{20 + u}|M|writer|9404{u}" for u in range(users)],
        }  # fmt: skip
        return encoded(text, "latin-1")
    if kind == "1m":
        text = {
            "ratings.dat": ["::".join(map(str, row)) for row in rows],
            "movies.dat": [f"{i}::{t}::Drama|Action" for i, t in films],
            "users.dat": [f"{7 * u + 1}::F::25::{u}::55117" for u in range(users)],
        }
        return encoded(text, "latin-1")
    text = {
        "ratings.csv": ["userId,movieId,rating,timestamp",
                        *(f"{u},{i},{r - rng.choice((0, 0.5))},{t}" for u, i, r, t in rows)],
        "movies.csv": ["movieId,title,genres",
                       *(f'{i},"{t}, The",Drama|Comedy' for i, t in films)],
    }  # fmt: skip
    return encoded(text, "utf-8")


def encoded(text: dict[str, list[str]], encoding: str) -> dict[str, bytes]:
    return {name: "".join(f"{x}\n" for x in lines).encode(encoding) for name, lines in text.items()}


def put(folder, files: dict[str, bytes]):
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- a second reader ------------------------------------------------------------------------------

RATINGS = {"u.data": "\t", "ratings.dat": "::", "ratings.csv": ","}
FILMS = {"u.item": "|", "movies.dat": "::", "movies.csv": ","}


def text_of(name: str, content: bytes) -> str | None:
    if name.endswith(".csv"):
        return content.decode("utf-8-sig", "replace") if strict(content) else None
    return content.decode("utf-8-sig") if strict(content) else content.decode("latin-1")


def strict(content: bytes) -> bool:
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


def ratings_of(files: dict[str, bytes]) -> list[tuple] | None:
    """The rows of the rating file, read field by field; None if a row is not one."""
    name = next(name for name in RATINGS if name in files)
    text = (files[name].decode("utf-8-sig", "replace")).replace("\r", "\n")
    rows, header = [], None
    for line in text.split("\n"):
        if not line.strip():
            continue
        fields = next(csv.reader([line])) if name.endswith("csv") else line.split(RATINGS[name])
        if name.endswith("csv") and header is None:
            header = fields
            continue
        if header is not None:
            if len(fields) != len(header) or not {"userId", "movieId", "rating"} <= set(header):
                return None
            fields = [fields[header.index(x)]
                      for x in ("userId", "movieId", "rating", "timestamp")]  # fmt: skip
        if len(fields) != 4:
            return None
        try:
            user, item, rating, time = *map(int, fields[:2]), float(fields[2]), int(fields[3])
        except ValueError:
            return None
        half = name.endswith("csv")
        if min(user, item, time) < 0 or max(user, item, time) >= 2**63:
            return None
        if not (0.5 if half else 1) <= rating <= 5 or rating * (2 if half else 1) % 1:
            return None
        rows.append((user, item, rating, time))
    return rows


def titles_of(files: dict[str, bytes]) -> dict[int, str] | None:
    """Title of each film; None if a row is not one."""
    name = next(name for name in FILMS if name in files)
    text = text_of(name, files[name])
    if text is None:
        return None
    titles: dict[int, str] = {}
    if name == "movies.csv":
        reader = csv.reader(io.StringIO(text, newline=""))
        header = next(reader)
        pairs = [(row[header.index("movieId")], row[header.index("title")])
                 for row in reader if row]  # fmt: skip
        # a row that was cut off raises IndexError: nobody can read it
    else:
        lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
        if name == "u.item":
            pairs = [tuple(line.split("|")[:2]) for line in lines]
        else:
            pairs = [(line.split("::")[0], line.partition("::")[2].rpartition("::")[0])
                     for line in lines]  # fmt: skip
    for number, title in pairs:
        if int(number) in titles:
            return None
        titles[int(number)] = title.strip()
    return titles


def tried(folder, files: dict[str, bytes]) -> str:
    """Load it: "loaded right" or how it was refused; fails on anything else."""
    put(folder, files)
    try:
        data = load(folder)
    except DataError as error:
        return refused(str(error), folder, files)
    expected = ratings_of(files)
    found = list(zip(data.user_ids[data.user].tolist(), data.item_ids[data.item].tolist(),
                     data.rating.tolist(), data.time.tolist(), strict=True))  # fmt: skip
    assert found == expected, "what was loaded is not what the file says"
    try:
        titles = titles_of(files)
    except (ValueError, IndexError) as error:
        raise AssertionError("a film file with a row that is none was loaded") from error
    assert titles is not None, "a film file that nobody can read was loaded"
    wanted = [titles.get(item, "") for item in data.item_ids.tolist()]
    assert data.titles == wanted, "the titles are not those of the file"
    return "loaded right"


def refused(message: str, folder, files: dict[str, bytes]) -> str:
    """Which kind of refusal it is; fails if it does not say where and what was expected."""
    assert str(folder) in message or any(name in message for name in files), message
    assert len(message) < 800 + 2 * len(str(folder)), f"{len(message)} characters"
    assert message.isprintable(), message
    at = re.search(r"([\w.]+), (line|film) (\d+)", message)
    if at and at[2] == "line" and at[1] in files:
        lines = files[at[1]].count(b"\n") + 1
        assert 1 <= int(at[3]) <= lines, message
        assert re.search("[Ee]xpected", message), message
        return "refused with file, line and what was expected"
    assert re.search("[Ee]xpected|more than once|lacks|must have|holds no|cut off|numbered",
                     message), message  # fmt: skip
    return "refused with file and what was expected"


# --- what is done to files ------------------------------------------------------------------------

FIELDS = [b"-1", b"0", b"", b"x", b"nan", b"NaN", b"inf", b"1e3", b"1.5", b"6", b"5.5", b"0.25"]
FIELDS += [b"9223372036854775807", b"9223372036854775808", b"99999999999999999999", b"+3", b" 4"]
FIELDS += [b"1_000", b"0x10", b'"3"', b"\xef\xbc\x93", b"\xd9\xa3", b"3\x00", b"1,5", b"3::4"]
FIELDS += [b"true", b"NULL", b"--1", b"1" * 400, b"\xff", b"2.0", b"007", b"\xc2\xa03"]


def lines_of(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


def truncate(content, rng):
    return content[: rng.randrange(len(content) + 1)]


def behead(content, rng):
    return content[rng.randrange(len(content)) :]


def change_byte(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]


def insert_bytes(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(rng.randint(1, 4)) + content[at:]


def drop_bytes(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.randint(1, 20) :]


def double_lines(content, rng):
    lines = lines_of(content)
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return b"".join(lines)


def shuffle_lines(content, rng):
    lines = lines_of(content)
    rng.shuffle(lines)
    return b"".join(lines)


def drop_line(content, rng):
    lines = lines_of(content)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def change_field(content, rng):
    lines = lines_of(content)
    at = rng.randrange(len(lines))
    separator = rng.choice([mark for mark in (b"::", b"\t", b"|", b",") if mark in lines[at]])
    fields = lines[at].rstrip(b"\n").split(separator)
    fields[rng.randrange(len(fields))] = rng.choice(FIELDS)
    lines[at] = separator.join(fields) + b"\n"
    return b"".join(lines)


def swap_fields(content, rng):
    lines = lines_of(content)
    at = rng.randrange(len(lines))
    separator = rng.choice([mark for mark in (b"::", b"\t", b"|", b",") if mark in lines[at]])
    fields = lines[at].rstrip(b"\n").split(separator)
    rng.shuffle(fields)
    lines[at] = separator.join(fields) + b"\n"
    return b"".join(lines)


def re_encode(content, rng):
    text = content.decode("utf-8" if strict(content) else "latin-1")
    encoding = rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-8", "latin-1", "cp1252", "utf-7"])
    return text.encode(encoding, "replace")


def line_ends(content, rng):
    return content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\x0b", b"\xe2\x80\xa8"]))


def empty(content, rng):
    return rng.choice([b"", b"\n", b" \n\n", b"\0", lines_of(content)[0], b"\xef\xbb\xbf"])


def separators(content, rng):
    old = rng.choice([mark for mark in (b"::", b"\t", b"|", b",") if mark in content])
    return content.replace(old, rng.choice([b"::", b"\t", b"|", b",", b";", b" "]))


def twice(content, rng):
    return content + content


CHANGES = {  # -> how the table names it
    truncate: "cut off", behead: "cut off", drop_bytes: "cut off", drop_line: "cut off",
    change_byte: "with bytes changed or put in", insert_bytes: "with bytes changed or put in",
    double_lines: "with lines doubled or in another order, or all of it twice",
    shuffle_lines: "with lines doubled or in another order, or all of it twice",
    twice: "with lines doubled or in another order, or all of it twice",
    change_field: "with a negative, missing, overflowing id, a rating off the scale, or the like",
    swap_fields: "with fields in another order, other separators or ends of lines",
    separators: "with fields in another order, other separators or ends of lines",
    line_ends: "with fields in another order, other separators or ends of lines",
    re_encode: "re-encoded", empty: "empty, or nearly",
}  # fmt: skip
KINDS = ("100k", "1m", "csv")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_file_is_refused_or_loaded_right(tmp_path, kind, change, tally, often):
    rng = random.Random(f"{kind} {change.__name__}")
    for number in range(often(4, 40)):
        files = make(kind, rng)
        name = rng.choice(list(files))
        files[name] = change(files[name], rng)
        where = f"number {number}, {name}"
        try:
            happened = tried(tmp_path / "own", files)
        except Exception as error:
            raise AssertionError(f"{where}: {files[name][:2000]!r}") from error
        tally(f"files {CHANGES[change]}", happened)


@pytest.mark.parametrize("kind", KINDS)
def test_files_mixed_up(tmp_path, kind, tally):
    """Each file with the content of each other one, of its own format and of the others."""
    rng = random.Random(kind)
    contents = [content for each in KINDS for content in make(each, rng).values()]
    for name in make(kind, rng):
        for content in contents:
            files = make(kind, random.Random(7))
            if files[name] != content:
                tally("files with the content of another", tried(tmp_path, files | {name: content}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_set_cut_off_at_any_byte(tmp_path, kind, monkeypatch, tally, often):
    """The counts of a published set are known: no part of one is ever taken for it."""
    files = make(kind, random.Random(3), ratings=60)
    data = load(put(tmp_path / "whole", files))
    assert (data.num_users, data.num_items) == (9, 12)
    monkeypatch.setitem(known.KNOWN, "ml-100k", known.Known(60, 9, 12, None))
    folder, rng = tmp_path / "ml-100k", random.Random(0)
    for name, content in files.items():
        places = sorted(rng.sample(range(len(content)), min(len(content), often(10, 300))))
        for place in places:
            try:
                data = load(put(folder, files | {name: content[:place]}))
            except DataError as error:
                tally("a published set cut off at any byte of each file", "refused")
                assert "ml-100k" in str(error) or name in str(error) or "ratings" in str(error)
            else:  # it lost what nobody misses: the end of the last line, or of the last field
                lost = content[place:]
                harmless = lost in (b"\n", b"\r\n") or name in ("u.user", "users.dat", "u.item",
                                                                "movies.dat", "movies.csv")
                assert harmless and b"\n" not in lost.strip(), (name, place, lost)
                assert data.num_interactions == 60
                tally("a published set cut off at any byte of each file",
                      "whole without the end of its last side line")  # fmt: skip


GIGANTIC = {
    "a line of 30 MB": lambda: b"1\t2\t3\t9" + b"0" * (30 << 20) + b"\n",
    "a line of 30 MB without a separator": lambda: b"x" * (30 << 20),
    "30 MB of zeros": lambda: bytes(30 << 20),
    "10 million empty lines, then a wrong one": lambda: b"\n" * 10_000_000 + b"1\t2\n",
    "a million fields in a line": lambda: b"1\t" * 1_000_000 + b"\n",
    "a million lines, the last one wrong": lambda: b"".join(
        b"%d\t%d\t3\t978300000\n" % (i % 997, i) for i in range(1_000_000)) + b"1\t2\t7\t4\n",
}  # fmt: skip


@pytest.mark.parametrize("what", GIGANTIC)
def test_gigantic_rating_files(tmp_path, what, tally, often):
    if not often(0, 1) and what not in list(GIGANTIC)[:2]:
        pytest.skip("in the long form")
    files = make("100k", random.Random(1))
    put(tmp_path, files | {"u.data": GIGANTIC[what]()})
    with pytest.raises(DataError) as error:
        load(tmp_path)
    happened = refused(str(error.value), tmp_path, {"u.data": b"\n" * 10_000_010})
    tally("gigantic files and lines", happened)


def test_a_genre_for_each_film_is_refused(tmp_path, tally):
    """As a table of films by genres it would take gigabytes."""
    films = "".join(f"{i},T{i},G{i}\n" for i in range(60_000))
    files = make("csv", random.Random(1))
    put(tmp_path, files | {"movies.csv": f"movieId,title,genres\n{films}".encode()})
    with pytest.raises(DataError, match="60,000 genres.*at most 1,000"):
        load(tmp_path)
    tally("gigantic files and lines", "refused with file and what was expected")


def test_it_is_a_sentence_on_the_command_line(tmp_path, tally, often, capsys, monkeypatch):
    """`kata data` and `kata run` end with exit code 2 and no traceback."""
    import argparse

    from harness import cli, data

    rng = random.Random(5)
    monkeypatch.setattr(data.overlay, "install", lambda roots: None)
    for _ in range(often(10, 100)):
        kind = rng.choice(KINDS)
        files = make(kind, rng)
        name = rng.choice(list(files))
        files[name] = rng.choice(list(CHANGES))(files[name], rng)
        args = argparse.Namespace(module="harness.data", name=str(put(tmp_path, files)))
        monkeypatch.setattr(cli, "parser", lambda args=args: argparse.Namespace(
            parse_args=lambda argv: args))  # fmt: skip
        code = cli.main([])
        said = capsys.readouterr()
        assert code in (0, 2), said.err
        if code == 2:
            assert said.err.startswith("kata: ") and said.err.count("\n") == 1, said.err
            assert said.out == ""
        happened = "a sentence and exit code 2" if code else "loaded"
        tally("`kata data NAME` on fuzzed files", happened)


# --- archives and downloads -----------------------------------------------------------------------


def test_a_damaged_zip_is_refused_or_whole(tmp_path, tally, often):
    """Bytes changed, cut, inserted, also in its directory: all as it was, or a refusal."""
    rng = random.Random(0)
    files = {f"set/{name}": content for name, content in make("100k", rng).items()}
    outside = sorted(path.name for path in tmp_path.iterdir())
    for number in range(often(100, 2000)):
        buffer = io.BytesIO()
        kind = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2,
                           zipfile.ZIP_LZMA])  # fmt: skip
        with zipfile.ZipFile(buffer, "w", kind) as file:
            for name, content in files.items():
                file.writestr(name, content)
        content = buffer.getvalue()
        for _ in range(rng.randint(1, 3)):
            directory = content.find(b"PK\x01\x02")
            change = rng.choice([truncate, change_byte, insert_bytes, drop_bytes, change_byte])
            if rng.random() < 0.5 and directory > 0:  # where names, sizes and checksums are
                content = content[:directory] + change(content[directory:] or b"x", rng)
            else:
                content = change(content or b"x", rng)
        archive = tmp_path / "set.zip"
        archive.write_bytes(content)
        folder = tmp_path / "out" / str(number)
        try:
            unpack(archive, folder)
        except DataError as error:
            assert str(archive) in str(error)
            tally("zip files with changed, cut or inserted bytes", "refused with the file named")
            assert not folder.exists()
        else:
            found = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            # a changed name or a lost entry is what the directory now says; a content is checked
            assert set(found.values()) <= set(files.values())
            whole = len(found) == len(files)
            tally("zip files with changed, cut or inserted bytes",
                  "whole" if whole else "the files that its directory names, each whole")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([*outside, "out", "set.zip"]), "something was written elsewhere"


BODY = bytes(range(256)) * 300
ANSWERS = ["whole", "cut", "short length", "long length", "garbage", "status", "other range",
           "nothing", "other content", "chunked", "chunked and cut", "endless header", "no length",
           "two lengths", "bad encoding", "416"]  # fmt: skip


def answer_of(kind: str, begin: int, rng: random.Random) -> bytes:
    """What a server says that may be broken, lying or another one."""
    body = BODY[begin:]
    if kind == "other content":
        body = rng.randbytes(len(body))
    length = len(body)
    if kind == "short length":
        length = rng.randrange(len(body) + 1)
    if kind == "long length":
        length += rng.randint(1, 1000)
    head = b"HTTP/1.1 206 Partial\r\n" if begin else b"HTTP/1.1 200 OK\r\n"
    if begin:
        first = begin + (rng.randint(-5, 5) if kind == "other range" else 0)
        head += b"Content-Range: bytes %d-%d/%d\r\n" % (first, len(BODY) - 1, len(BODY))
    if kind == "status":
        return b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % rng.choice([404, 500, 302, 204])
    if kind == "416":
        return b"HTTP/1.1 416 No\r\nContent-Range: bytes */%d\r\nContent-Length: 0\r\n\r\n" % (
            rng.choice([begin, 7]))  # fmt: skip
    if kind == "garbage":
        return rng.randbytes(300)
    if kind == "nothing":
        return b""
    if kind == "endless header":
        return head + b"X-Y: " + b"z" * 200_000
    if kind.startswith("chunked"):
        whole = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 9999]), body[i : i + 9999])
                         for i in range(0, len(body), 9999)) + b"0\r\n\r\n"  # fmt: skip
        answer = head + b"Transfer-Encoding: chunked\r\n\r\n" + whole
        return answer[: rng.randrange(len(answer))] if kind == "chunked and cut" else answer
    if kind == "two lengths":
        head += b"Content-Length: 7\r\n"
    if kind == "bad encoding":
        head += b"Content-Encoding: gzip\r\n"
    if kind != "no length":
        head += b"Content-Length: %d\r\n" % length
    answer = head + b"\r\n" + body
    return answer[: rng.randrange(len(answer))] if kind == "cut" else answer


@contextlib.contextmanager
def liar(answers):
    """A server on the loopback that gives the next of `answers` to each request; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    asked = b""
                    while b"\r\n\r\n" not in asked and (more := connection.recv(4096)):
                        asked += more
                    begin = re.search(rb"Range: bytes=(\d+)-", asked)
                    connection.sendall(next(answers)(int(begin[1]) if begin else 0))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/file"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def test_a_download_is_the_file_or_an_error(tmp_path, monkeypatch, tally, often):
    """From a server that breaks off, lies and changes its mind, again and again."""
    monkeypatch.setattr(download_module, "TIMEOUT", 2.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    rng, target = random.Random(0), tmp_path / "file"
    told = []

    def answers():
        while True:
            kind = rng.choice(told[-1]) if rng.random() < 0.8 else "whole"
            yield lambda begin, kind=kind: answer_of(kind, begin, rng)

    with liar(answers()) as url:
        for _ in range(often(40, 600)):
            told.append(rng.sample(ANSWERS, 3))
            for _ in range(40):
                try:
                    download(url, target, md5=md5(BODY, usedforsecurity=False).hexdigest())
                except DataError as error:
                    assert url in str(error), error
                    assert not target.exists()
                    tally("answers of servers that break off, lie, change their mind",
                          "an error that names the address")  # fmt: skip
                else:
                    assert target.read_bytes() == BODY
                    tally("answers of servers that break off, lie, change their mind",
                          "the file, whole")  # fmt: skip
                    target.unlink()
                    break
            else:
                raise AssertionError(f"never came through: {told[-1]}")
            assert not list(tmp_path.iterdir()), "something was left behind"


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r} + "/src"]
from recsys.data.errors import DataError
from recsys.data.unpack import unpack
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    unpack(Path(sys.argv[1]), Path(sys.argv[1]).parent / "in" / "out")
except DataError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files cannot be limited there")
def test_a_disk_that_fills_up_while_unpacking(tmp_path, tally):
    """A file that may not grow any further: nothing of the set is there afterwards."""
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in "abc":
            file.writestr(f"set/{name}", b"".join(b"%d\n" % i for i in range(100_000)))
    for most in (0, 1000, 300_000):
        command = [sys.executable, "-c", FULL.format(root=str(ROOT)), str(archive), str(most)]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0 and "could not be unpacked" in done.stdout, done
        assert list((tmp_path / "in").iterdir()) == []
        tally("unpacking on a disk that fills up", "an error; nothing left behind")
