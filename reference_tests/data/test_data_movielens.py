"""Reading the three formats, and what a reader is told when files are wrong."""

import zipfile

import numpy as np
import pytest

from recsys.data import known, movielens
from recsys.data.errors import DataError
from recsys.data.load import load


def write(folder, files, encoding="latin-1"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        text = lines if isinstance(lines, str) else "".join(line + "\n" for line in lines)
        (folder / name).write_bytes(text.encode(encoding))
    return folder


FLAGS = "|0|1|0", "|1|0|0", "|0|1|1"
SET_100K = {
    "u.data": ["7\t20\t3\t900", "4\t30\t5\t800", "7\t10\t1\t900", "4\t20\t4\t850"],
    "u.item": [
        "10|Amélie (2001)|01-Feb-2002||http://a" + FLAGS[0],
        "20|unknown||||" + FLAGS[1][1:],
        "30|Old One|04-Feb-1971||http://b" + FLAGS[2],
        "40|Never rated (1990)|01-Jan-1990||http://c" + FLAGS[2],
    ],
    "u.genre": ["unknown|0", "Action|1", "Drama|2", ""],
    "u.user": ["4|17|F|writer|94043", "7|35|M|artist|T8H1N"],
}
SET_100K["u.item"][1] = "20|unknown|||" + FLAGS[1]
SET_1M = {
    "ratings.dat": ["7::20::3::900", "4::30::5::800", "7::10::1::900", "4::20::4::850"],
    "movies.dat": [
        "10::Amélie: Part :: Two (2001)::Drama|Action",
        "20::Plain::Drama",
        "30::Old One (1971) (V)::Comedy",
    ],
    "users.dat": ["4::F::1::10::94043", "7::M::35::2::55117"],
}
SET_CSV = {
    "ratings.csv": ["userId,movieId,rating,timestamp", "7,20,3.0,900", "4,30,5.0,800",
                    "7,10,0.5,900", "4,20,4.5,850"],
    "movies.csv": ["movieId,title,genres", '10,"Amélie, The (2001)",Drama|Action',
                   "20,NA,(no genres listed)", "30,Series (1998–2004),Drama"],
}  # fmt: skip


def folder_100k(tmp_path, **changed):
    return write(
        tmp_path / "own", {**SET_100K, **{k.replace("_", "."): v for k, v in changed.items()}}
    )


def check_common(data):
    assert data.user_ids.tolist() == [4, 7] and data.item_ids.tolist() == [10, 20, 30]
    assert data.user.tolist() == [1, 0, 1, 0]  # in the order of the file
    assert data.item.tolist() == [1, 2, 0, 1]
    assert data.time.tolist() == [900, 800, 900, 850]
    assert (data.num_users, data.num_items, data.num_interactions) == (2, 3, 4)
    kinds = [column.dtype for column in (data.user, data.item, data.rating, data.time)]
    assert kinds == [np.int64, np.int64, np.float32, np.int64]


def test_100k(tmp_path):
    data = load(folder_100k(tmp_path))
    check_common(data)
    assert data.name == "own"
    assert data.rating.tolist() == [3, 5, 1, 4]
    assert data.titles == ["Amélie (2001)", "unknown", "Old One"]
    assert data.years.tolist() == [2001, 0, 1971]  # the title's goes before the release date
    assert data.genre_names == ["Action", "Drama"]
    assert data.genres.tolist() == [[True, False], [False, False], [True, True]]
    assert data.user_feature_sizes == {"age": 7, "gender": 2, "occupation": 2, "zip": 11}
    codes = {name: code.tolist() for name, code in data.user_features.items()}
    assert codes == {"age": [0, 3], "gender": [0, 1], "occupation": [1, 0], "zip": [9, 10]}
    assert data.notes == ()


def test_1m(tmp_path):
    data = load(write(tmp_path / "own", SET_1M))
    check_common(data)
    assert data.rating.tolist() == [3, 5, 1, 4]
    assert data.titles == ["Amélie: Part :: Two (2001)", "Plain", "Old One (1971) (V)"]
    assert data.years.tolist() == [2001, 0, 1971]
    assert data.genre_names == ["Action", "Comedy", "Drama"]
    assert data.genres.astype(int).tolist() == [[1, 0, 1], [0, 0, 1], [0, 1, 0]]
    codes = {name: code.tolist() for name, code in data.user_features.items()}
    assert codes == {"age": [0, 3], "gender": [0, 1], "occupation": [1, 0], "zip": [9, 5]}


def test_csv(tmp_path):
    data = load(write(tmp_path / "own", SET_CSV, "utf-8"))
    check_common(data)
    assert data.rating.tolist() == [3, 5, 0.5, 4.5]
    assert data.titles == ["Amélie, The (2001)", "NA", "Series (1998–2004)"]
    assert data.years.tolist() == [2001, 0, 1998]
    assert data.genre_names == ["Action", "Drama"]
    assert data.genres.astype(int).tolist() == [[1, 1], [0, 0], [0, 1]]
    assert data.user_features == {} and data.user_feature_sizes == {}


def test_occupations_are_numbered_as_numbers(tmp_path):
    users = ["4::F::1::10::94043", "7::M::35::9::55117"]
    data = load(write(tmp_path / "own", {**SET_1M, "users.dat": users}))
    assert data.user_features["occupation"].tolist() == [1, 0]


def test_own_csv_may_order_its_columns_otherwise_and_have_more(tmp_path):
    rows = ["note,timestamp,rating,movieId,userId", "a,900,3.5,20,7", '"b, c",800,5,30,4',
            ",900,1,10,7", "d,850,4,20,4"]  # fmt: skip
    data = load(write(tmp_path / "own", {**SET_CSV, "ratings.csv": rows}, "utf-8-sig"))
    check_common(data)
    assert data.rating.tolist() == [3.5, 5, 1, 4]


@pytest.mark.parametrize("end", ["\r\n", "\n\n"])
def test_line_ends_and_blank_lines_do_not_matter(tmp_path, end):
    for name, files in {"a": SET_100K, "b": SET_1M, "c": SET_CSV}.items():
        changed = {file: end.join(lines) + end for file, lines in files.items()}
        check_common(load(write(tmp_path / name, changed, "utf-8")))


def test_the_reconstruction_is_read_and_noted(tmp_path):
    files = {**SET_1M, "ratings.reconstructed.dat": SET_1M["ratings.dat"]}
    del files["ratings.dat"]
    data = load(write(tmp_path / "own", files))
    assert "reconstruction" in data.notes[0]
    (tmp_path / "own" / "ratings.dat").write_text("".join(r + "\n" for r in SET_1M["ratings.dat"]))
    assert load(tmp_path / "own").notes == ()  # the original goes first


def test_files_converted_to_utf_8_are_read_as_that(tmp_path):
    assert load(write(tmp_path / "own", SET_1M, "utf-8")).titles[0].startswith("Amélie")


def test_rated_items_that_the_movie_file_does_not_know(tmp_path):
    items = [SET_100K["u.item"][0], SET_100K["u.item"][2]]
    data = load(folder_100k(tmp_path, u_item=items))
    assert data.titles == ["Amélie (2001)", "", "Old One"] and data.years[1] == 0
    assert data.genres.any(axis=1).tolist() == [True, False, True]
    assert len(data.notes) == 1 and "1 rated items are not in u.item" in data.notes[0]


def test_an_item_rated_again_later_is_kept_and_noted(tmp_path):
    data = load(folder_100k(tmp_path, u_data=[*SET_100K["u.data"], "4\t20\t1\t860"]))
    assert data.num_interactions == 5
    assert data.notes == ("1 ratings are of an item that the same user has rated at another time",)


def fails(folder, *parts):
    with pytest.raises(DataError) as error:
        load(folder)
    for part in parts:
        assert part in str(error.value), str(error.value)


WRONG = ["1\t2\tx\t900", "1\t2\t6\t900", "1\t2\t0\t900", "1\t2\t3.5\t900", "-1\t2\t3\t900",
         "1\t-2\t3\t900", "1\t99999999999999999999\t3\t900", "1\t2\t3\t-5", "1\t2\t3\t8.8e+08",
         "1\t2\t3", "1\t2\t3\t4\t5", "1\t\t3\t900", "nan\t2\t3\t900", "1 2 3 900",
         "1\t2\t3\t900\t", '"1"\t2\t3\t900']  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_wrong_line_is_named(tmp_path, line, at):
    lines = list(SET_100K["u.data"])
    lines.insert(at, line)
    shown = line.replace("\t", "\\t")
    expected = "expected user id, item id, rating 1 to 5 and Unix time, separated by tabs"
    fails(folder_100k(tmp_path, u_data=lines), f'u.data, line {at + 1}: "{shown}" - {expected}')


def test_the_line_is_counted_with_blank_lines(tmp_path):
    lines = ["", SET_100K["u.data"][0], "", "1\t2\tx\t4"]
    fails(folder_100k(tmp_path, u_data=lines), "u.data, line 4:")


COLONS = "1::2:3::4 1:2:3:4 1::2::3::4:: 1::x2::3::4 1::2::9::4 1:x:2::3::4 1::2::3"


@pytest.mark.parametrize("line", COLONS.split())
def test_a_wrong_line_with_colons(tmp_path, line):
    folder = write(tmp_path / "own", {**SET_1M, "ratings.dat": [*SET_1M["ratings.dat"], line]})
    fails(folder, f'ratings.dat, line 5: "{line}"', "separated by '::'")


COMMAS = (
    '1,2,3.3,4 1,2,0,4 1,2,5.5,4 1,2,,4 1,2,three,4 1,2,4,5,964 1,2,3 1,2,3,4.5 a,2,3,4 1,"2,3,4'
)


@pytest.mark.parametrize("line", COMMAS.split())
@pytest.mark.parametrize("at", [1, 5])
def test_a_wrong_line_with_commas(tmp_path, line, at):
    lines = list(SET_CSV["ratings.csv"])
    lines.insert(at, line)
    folder = write(tmp_path / "own", {**SET_CSV, "ratings.csv": lines}, "utf-8")
    fails(folder, f'ratings.csv, line {at + 1}: "{line}"', "0.5 to 5 in half stars", "commas")


def test_decimal_commas_are_no_surplus_fields(tmp_path):
    rows = ["userId,movieId,rating,timestamp", "1,10,4,5,900", "1,20,3,5,901"]
    folder = write(tmp_path / "a", {**SET_CSV, "ratings.csv": rows}, "utf-8")
    fails(folder, 'ratings.csv, line 2: "1,10,4,5,900"')
    rows = ["movieId,title,genres", "10,A, The,Drama", "20,B, The,Drama", "30,C, The,Drama"]
    folder = write(tmp_path / "b", {**SET_CSV, "movies.csv": rows}, "utf-8")
    fails(folder, 'movies.csv, line 2: "10,A, The,Drama"', "3 fields, as in the header, not 4")


def test_a_missing_header_is_named(tmp_path):
    rows = SET_CSV["ratings.csv"][1:]
    fails(write(tmp_path / "a", {**SET_CSV, "ratings.csv": rows}, "utf-8"),
          "ratings.csv, line 1", "userId is missing")  # fmt: skip
    rows = ["movieId,name,genres", "1,A,Drama"]
    fails(write(tmp_path / "b", {**SET_CSV, "movies.csv": rows}, "utf-8"),
          "movies.csv, line 1", "title is missing")  # fmt: skip


@pytest.mark.parametrize(
    ("file", "line", "parts"),
    [
        ("u.item", "50|No flags|01-Jan-1990||x|0|1", ["line 5", "3 flags"]),
        ("u.user", "9|x|M|writer|94043", ["line 3", "user id|age"]),
        ("u.genre", "Western", ["line 5", "genre|number"]),
        ("u.genre", "Western|7", ["numbered from 0"]),
        ("u.user", "4|17|F|writer|94043", ["u.user: id 4 stands there more than once"]),
        ("u.item", SET_100K["u.item"][0], ["u.item: id 10 stands there more than once"]),
    ],
)
def test_wrong_side_files(tmp_path, file, line, parts):
    fails(write(tmp_path / "own", {**SET_100K, file: [*SET_100K[file], line]}), file, *parts)


@pytest.mark.parametrize("row", ["40,A, B (1999),Drama", "x,A,Drama", "-4,A,Drama", '40,"A,Drama'])
@pytest.mark.parametrize("at", [1, 4])
def test_wrong_rows_of_movies(tmp_path, row, at):
    rows = list(SET_CSV["movies.csv"])
    rows.insert(at, row)
    fails(write(tmp_path / "own", {**SET_CSV, "movies.csv": rows}, "utf-8"), "movies.csv")


@pytest.mark.parametrize("files", [SET_100K, SET_1M, SET_CSV])
def test_empty_files(tmp_path, files):
    for file in files:
        fails(write(tmp_path / "own", {**files, file: ""}, "utf-8"), file)
    if "ratings.csv" in files:
        for file in files:
            fails(write(tmp_path / "own", {**files, file: files[file][:1]}, "utf-8"), file, "only")


def test_latin_1_where_utf_8_is_due_names_the_line(tmp_path):
    files = {**SET_CSV, "movies.csv": ["movieId,title,genres", "1,A,", "2,é,"]}
    fails(write(tmp_path / "own", files), "movies.csv, line 3", "0xe9", "UTF-8")


def test_missing_files_are_named(tmp_path):
    fails(write(tmp_path / "a", {"u.data": SET_100K["u.data"]}), "u.item", "u.genre", "u.user")
    fails(
        write(tmp_path / "b", {"x.txt": []}), "u.data", "ratings.dat", "ratings.csv", "movies.csv"
    )
    fails(write(tmp_path / "c", {"ratings.csv": []}), "lacks movies.csv")
    fails(tmp_path / "nowhere", "There is no data set", "synthetic", "ml-100k")
    fails(write(tmp_path / "d", SET_CSV, "utf-8") / "ratings.csv", "Expected the folder")
    fails("ml-10k", "There is no data set 'ml-10k'")


def test_repeated_rows_are_refused(tmp_path):
    rows = [*SET_100K["u.data"], "7\t10\t5\t900"]
    fails(folder_100k(tmp_path, u_data=rows),
          "item 10 by user 7 at time 900", "more than once")  # fmt: skip


def test_a_user_without_a_line_is_refused(tmp_path):
    fails(folder_100k(tmp_path, u_user=SET_100K["u.user"][:1]), "user 7", "no line in u.user")


def test_a_known_set_must_be_whole(tmp_path, monkeypatch):
    times = [f"{line}000000" for line in SET_100K["u.data"]]  # after 1995
    files = {**SET_100K, "u.data": times}
    folder = write(tmp_path / "ml-100k", files)
    fails(folder, "ml-100k has 100,000 ratings, but 4 were found")
    monkeypatch.setitem(known.KNOWN, "ml-100k", known.Known(4, 2, 4, None))
    assert load(folder).name == "ml-100k"
    write(folder, {"u.data": times[:3]})
    fails(folder, "4 ratings, but 3")
    write(folder, {"u.data": times, "u.item": files["u.item"][:3]})
    fails(folder, "4 movies, but 3")
    write(folder, {"u.data": [*times[:3], "9" + times[3]], "u.item": files["u.item"],
                   "u.user": [*files["u.user"], "94|3|M|artist|1"]})  # fmt: skip
    fails(folder, "2 users, but 3")
    write(folder, {"u.data": "\n".join(times)[:-2]})  # the last line lost a part of its time
    fails(folder, "cut off")


def test_the_known_sets_have_their_published_sizes():
    sizes = {name: (k.ratings, k.users, k.movies) for name, k in known.KNOWN.items()}
    assert sizes["ml-100k"] == (100_000, 943, 1_682)
    assert sizes["ml-1m"] == (1_000_209, 6_040, 3_883)
    assert sizes["ml-latest-small"] == (100_836, 610, 9_742)
    assert sizes["ml-25m"] == (25_000_095, 162_541, 62_423)
    assert sizes["ml-32m"] == (32_000_204, 200_948, 87_585)


def test_a_set_is_found_under_kata_data(tmp_path, monkeypatch):
    monkeypatch.setitem(known.KNOWN, "ml-100k", known.Known(4, 2, 4, None))
    monkeypatch.setattr(known, "EARLIEST", 0)
    monkeypatch.setenv("KATA_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path / "sets" / "ml-100k", SET_100K)
    for place in (folder.parent, folder):
        monkeypatch.setenv("KATA_DATA", str(place))
        assert load("ml-100k").name == "ml-100k"
    (tmp_path / "links").mkdir()
    elsewhere = write(folder.parent / "movielens-100", SET_100K)
    (tmp_path / "links" / "ml-100k").symlink_to(elsewhere)
    monkeypatch.setenv("KATA_DATA", str(tmp_path / "links"))
    assert load("ml-100k").name == "ml-100k"  # what was asked for, wherever it lies
    monkeypatch.delenv("KATA_DATA")
    write(tmp_path / "cache" / "ml-100k", SET_100K)
    assert load("ml-100k").num_interactions == 4


def test_a_zip_file_is_unpacked_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KATA_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "ml-100k.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, lines in SET_100K.items():
            file.writestr(f"ml-100k/{name}", "\n".join(lines).encode("latin-1"))
    fails(archive, "ml-100k has 100,000 ratings, but 4")  # its name is kept, and checked
    archive.rename(tmp_path / "own.zip")
    for _ in range(2):
        check_common(load(tmp_path / "own.zip"))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["cache"]
    (tmp_path / "own.zip").write_bytes(b"PK no zip at all")
    fails(tmp_path / "own.zip", "not a whole zip file")


def test_good_files_are_never_read_line_by_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr("recsys.data.tables._find_error", refuse)
    for name, files in {"a": SET_100K, "b": SET_1M, "c": SET_CSV}.items():
        movielens.read_folder(write(tmp_path / name, files, "utf-8"))
