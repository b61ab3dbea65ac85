"""Documents: every kind of source, the split, and each complaint word for word."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomai import corpus
from nanomai.config import ConfigError, DataConfig
from nanomai.corpus import CorpusError, Source, documents, fingerprint, is_validation, parse_mixture, source_bytes


def read(path, **settings):
    return list(documents(Source(str(path)), DataConfig(**settings)))


def write_folder(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("corpus, expected", [
    ("stdlib", [Source("stdlib")]),
    ("a.txt:0.7", [Source("a.txt", 0.7)]),
    ("a.txt:0.7:4, b:1e1", [Source("a.txt", 0.7, 4.0), Source("b", 10.0)]),
    ("hf:owner/name:.5,stdlib:2", [Source("hf:owner/name", 0.5), Source("stdlib", 2.0)]),
    ("C:\\texts:3", [Source("C:\\texts", 3.0)]),
    ("a:b:1:2", [Source("a:b", 1.0, 2.0)]),
    ("2024:1:5:1", [Source("2024:1", 5.0, 1.0)]),
    ("a:0.7x", [Source("a:0.7x")]),
])
def test_mixtures_are_read_from_the_right(corpus, expected):
    assert parse_mixture(corpus) == tuple(expected)


@pytest.mark.parametrize("corpus, message", [
    ("a,,b", "corpus 'a,,b' has an empty part; write PATH:WEIGHT:MAX_EPOCHS,..."),
    ("", "corpus '' has an empty part; write PATH:WEIGHT:MAX_EPOCHS,..."),
    ("a:0", "corpus 'a:0': weight and max_epochs must be above 0, finite"),
    ("a:1e999,b", "corpus 'a:1e999': weight and max_epochs must be above 0, finite"),
    ("a:-1", "corpus 'a:-1': weight and max_epochs must be above 0, finite"),
    ("b,a:1:0", "corpus 'a:1:0': weight and max_epochs must be above 0, finite"),
    ("a:1,a:2", "corpus 'a' is named twice; give it one weight"),
])
def test_wrong_mixtures(corpus, message):
    with pytest.raises(ConfigError) as error:
        parse_mixture(corpus)
    assert str(error.value) == message and error.value.field == "data.corpus"


@given(st.lists(st.tuples(st.from_regex(r"[a-z/.:]*[a-z]", fullmatch=True), st.floats(0.001, 1e6),
                          st.none() | st.floats(0.001, 100)), min_size=1, unique_by=lambda part: part[0]))
def test_any_mixture_is_read_back(parts):
    text = ",".join(f"{path}:{weight!r}" + (f":{epochs!r}" if epochs else "") for path, weight, epochs in parts)
    assert parse_mixture(text) == tuple(Source(*part) for part in parts)


def test_the_standard_library_is_large_and_split_for_good():
    found = read("stdlib")
    sizes = {split: sum(len(d.text) for d in found if d.split == split) for split in ("train", "val")}
    assert sizes["val"] > 1_000_000 and 7_000_000 < sum(sizes.values()) < 11_000_000
    assert {d.licence for d in found} == {"PSF-2.0"}
    names = [d.name for d in found]
    assert "asyncio/base_events.py" in names
    assert not {part for n in names for part in n.split("/")} & {"test", "tests", "idle_test", "site-packages"}
    assert found == read("stdlib")


def test_every_name_of_the_allowlist_is_known_to_some_python():
    assert len(sys.stdlib_module_names & set(corpus.STDLIB)) > 150  # the others came or went with a version
    assert sorted(set(corpus.STDLIB)) == corpus.STDLIB


def test_a_single_text_is_cut_as_nanogpt_cuts_it(tmp_path):
    text = "First Citizen:\nBefore we proceed é any further, hear me speak.\n\n" * 400
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    train, val = read(tmp_path / "input.txt", val_fraction=0.1)
    assert (train.split, val.split, train.name) == ("train", "val", "input.txt")
    assert train.text == text[: int(len(text) * 0.9)] and val.text == text[int(len(text) * 0.9) :]
    (tmp_path / "empty.txt").touch()
    assert read(tmp_path, val_fraction=0.1) == [train, val]  # a folder with nothing else in it


@pytest.mark.parametrize("blank", ["\n\n", "\n", ""])
def test_a_long_text_becomes_pieces_that_join_to_it(tmp_path, monkeypatch, blank):
    monkeypatch.setattr(corpus, "PIECE", 1000)
    text = "".join(f"paragraph {i} of the book.{blank}" for i in range(300))
    (tmp_path / "book.txt").write_text(text)
    pieces = [d.text for d in read(tmp_path / "book.txt")]
    assert "".join(pieces) == text and all(len(piece) <= 1000 for piece in pieces) and len(pieces) > 5
    if blank:
        assert sum(piece.endswith(blank) for piece in pieces) >= len(pieces) - 1  # all but the cut of the split


def test_a_folder_is_split_by_file_and_by_bytes(tmp_path):
    folder = write_folder(tmp_path, {f"{i % 7}/{i}.txt": f"{i} " * (50 + i) for i in range(200)})
    write_folder(folder, {".git/x.txt": "hidden", "0/.secret.md": "hidden", "picture.png": "not text", "empty.py": ""})
    found = read(folder, val_fraction=0.2)
    assert len(found) == 200 and {d.licence for d in found} == {"not stated"}
    total, val = (sum(len(d.text) for d in found if d.split in splits) for splits in ({"train", "val"}, {"val"}))
    assert 0.2 <= val / total < 0.22
    held_out = [d.name for d in found if d.split == "val"]
    assert held_out == [d.name for d in found][: len(held_out)]  # the files of the lowest places, read first
    assert [d.name for d in read(folder, val_fraction=0.5) if d.split == "val"][: len(held_out)] == held_out


def test_a_file_that_is_most_of_the_text_is_trained_on(tmp_path):
    folder = write_folder(tmp_path, {"book.txt": "long " * 1000, "a.md": "short", "b.md": "short too"})
    assert {d.name: d.split for d in read(folder)} == {"book.txt": "train", "a.md": "val", "b.md": "val"}


def test_windows_line_ends_are_read_as_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n" * 50)
    assert "".join(d.text for d in read(tmp_path)) == "one\ntwo\n" * 50


@given(st.text(min_size=1), st.floats(0.01, 0.99))
def test_the_split_of_rows_only_grows_with_the_fraction(name, fraction):
    assert is_validation(name, 1.0) and not is_validation(name, 0.0)
    assert not is_validation(name, fraction / 2) or is_validation(name, fraction)


def test_the_place_of_a_name_never_changes():
    assert corpus.place("argparse.py") == 0.33931810356806646


ROWS = [{"text": f"row {i} é", "other": i} for i in range(500)]


def write_rows(path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=100)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else b"\n" + lines)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_are_split_one_by_one(tmp_path, name):
    found = read(write_rows(tmp_path / name), val_fraction=0.3)
    assert [d.text for d in found] == [row["text"] for row in ROWS]
    assert 0.2 < sum(d.split == "val" for d in found) / 500 < 0.4
    assert all((d.split == "val") == is_validation(d.name, 0.3) for d in found)
    assert found[0].name == ("rows.jsonl:2" if name == "rows.jsonl" else f"{name}:1")  # line 1 is empty there
    assert read(tmp_path, val_fraction=0.3) == found


def test_a_hugging_face_dataset_streams(tmp_path):
    write_rows(tmp_path / "train.parquet")
    found = read(f"hf:{tmp_path}")
    assert [d.text for d in found] == [row["text"] for row in ROWS]
    assert {d.split for d in found} == {"train", "val"} and found[0].name == f"hf:{tmp_path}:1"
    with pytest.raises(CorpusError) as error:
        read(f"hf:{tmp_path}", text_field="content")
    assert str(error.value) == (f"hf:{tmp_path} row 1 has no field 'content', only 'text', 'other'; "
                                "set data.text_field")
    with pytest.raises(CorpusError, match=r"^hf:/no/where cannot be read: .+$"):
        read("hf:/no/where")


def test_what_tells_that_a_source_has_changed(tmp_path):
    source = Source(str(write_folder(tmp_path, {"a.txt": "one", "b.txt": "two"})))
    before = fingerprint(source)
    assert before == fingerprint(source) and source_bytes(source) == 6
    (tmp_path / "a.txt").write_text("one more")
    assert before != fingerprint(source)
    write_rows(tmp_path / "c.parquet")
    assert source_bytes(source) is None and source_bytes(Source("hf:x")) is None and fingerprint(Source("hf:x"))


LINES = [
    ("rows.jsonl", b'{"text": "a"}\n{"txt": 1, "x": 2}',
     "{path} line 2 has no field 'text', only 'txt', 'x'; set data.text_field"),
    ("rows.jsonl", b"{}", "{path} line 1 has no field 'text', only nothing; set data.text_field"),
    ("rows.jsonl", b'{"text": "a"}\n\n{"text": 1}', "{path} line 3: field 'text' is int, not text"),
    ("rows.jsonl", b'{"text": null}', "{path} line 1: field 'text' is NoneType, not text"),
    ("rows.jsonl", b'{"text": "a"',
     "{path} line 1 is not valid JSON: Expecting ',' delimiter: line 1 column 13 (char 12)"),
    ("rows.jsonl", b'["text"]', "{path} line 1 is not a JSON object"),
    ("rows.jsonl", b'{"text": "\xff"}', "{path} line 1 is not UTF-8 text"),
    ("rows.jsonl", b'{"text": "\\ud800"}', "{path} line 1: field 'text' holds half of a surrogate pair"),
    ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9],
     "{path} cannot be read beyond line 9: Compressed file ended before the end-of-stream marker was reached"),
    ("rows.jsonl.gz", b"no gzip", "{path} cannot be read beyond line 0: Not a gzipped file (b'no')"),
    ("rows.parquet", b"no parquet", "{path} cannot be read: Parquet magic bytes not found in footer. "
                                    "Either the file is corrupted or this is not a parquet file."),
    ("latin.txt", b"caf\xe9", "{path} is not UTF-8 text (byte 3); convert it or take it out"),
]


@pytest.mark.parametrize("name, data, message", LINES)
def test_what_cannot_be_read_is_named(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CorpusError) as error:
        read(path)
    assert str(error.value) == message.format(path=path)


def test_a_parquet_column_that_is_not_there(tmp_path):
    path = write_rows(tmp_path / "rows.parquet")
    for field, message in [("body", " has no field 'body', only 'text', 'other'; set data.text_field"),
                           ("other", ": field 'other' is int, not text")]:
        with pytest.raises(CorpusError) as error:
            read(path, text_field=field)
        assert str(error.value) == f"{path} row 1{message}"


@pytest.mark.parametrize("package, source, message", [
    ("datasets", "hf:a/b", "hf:a/b needs the datasets package: pip install datasets"),
    ("pyarrow", "rows.parquet", "rows.parquet needs pyarrow to be read: pip install pyarrow"),
])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, source, message):
    write_rows(tmp_path / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CorpusError) as error:
        read(source)
    assert str(error.value) == message


def test_a_source_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "gone")
    assert str(error.value) == (f"corpus '{tmp_path}/gone' does not exist; give `stdlib`, a file, a folder or hf:NAME")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError) as error:
        read(tmp_path)
    assert str(error.value) == (f"corpus '{tmp_path}' holds no text; a folder is searched for .txt, .md, .py, .jsonl, "
                                ".jsonl.gz, .parquet and the like") and error.value.field == "data.corpus"
