"""Documents: where text comes from, under which licence, and which part of it is held out.

Whatever the source, it becomes one stream of `Document`s, the same on every machine and in every run. Every document
has a name (its path inside the source, or file:row), and a hash of that name gives it a *place* in [0, 1). Files are
read in the order of their places, so that any beginning of the stream is a fair sample of the whole.

What is validation:
- rows of JSONL, Parquet and Hugging Face datasets: those whose place is below `val_fraction`;
- text files: in the order of their places, until `val_fraction` of all bytes is reached. A file with more than half
  of all bytes is never held out;
- a source that is one single text file: its end, `text[int(n * (1 - val_fraction)):]` with n in characters. At
  val_fraction 0.1 this is the split that nanoGPT makes of its `input.txt`.
"""

from __future__ import annotations

import gzip
import json
import math
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanomai.config import ConfigError, DataConfig

PIECE = 2**20
"""Characters: longer text files become several documents, cut at an empty line where there is one."""

TEXT_SUFFIXES = frozenset(""".txt .text .md .markdown .rst .tex .org .html .htm .xml .csv .tsv .yaml .yml .toml .ini
    .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .cuh .cs .java .kt .scala .js .jsx .ts .tsx .css .go .rs .rb .pl .php .swift
    .lua .r .jl .m .hs .ml .ex .exs .clj .el .lisp .sh .sql .proto .cmake""".split())
"""What is read in a folder, besides .jsonl, .jsonl.gz and .parquet. A file given by its own path may end otherwise."""

STDLIB = """__future__ _aix_support _android_support _ast_unparse _collections_abc _colorize _compat_pickle _compression
    _ios_support _markupbase _osx_support _py_abc _py_warnings _pydatetime _pydecimal _pyio _pylong _pyrepl
    _sitebuiltins _strptime _threading_local _weakrefset abc aifc annotationlib antigravity argparse ast asynchat
    asyncio asyncore base64 bdb bisect bz2 cProfile calendar cgi cgitb chunk cmd code codecs codeop collections
    colorsys compileall compression concurrent configparser contextlib copy copyreg crypt csv ctypes curses dataclasses
    datetime dbm decimal difflib dis distutils doctest email ensurepip enum filecmp fileinput fnmatch fractions ftplib
    functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html http idlelib imaplib imghdr
    imp importlib inspect io ipaddress json lib2to3 linecache logging lzma mailbox mailcap mimetypes modulefinder
    multiprocessing netrc nntplib ntpath nturl2path numbers opcode operator optparse os pathlib pdb pickle pickletools
    pipes pkgutil platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri
    random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtpd smtplib sndhdr
    socket socketserver sqlite3 ssl stat statistics string struct subprocess sunau symtable sysconfig tabnanny tarfile
    telnetlib tempfile textwrap threading timeit tkinter tokenize tomllib trace traceback tracemalloc tty turtle
    turtledemo types typing unittest urllib uu uuid venv warnings wave weakref webbrowser wsgiref xdrlib xml xmlrpc
    zipapp zipfile zipimport zoneinfo""".split()
"""What people wrote, in Python 3.11 to 3.14; what a version lacks is skipped. `locale`, `encodings`, `stringprep`,
`token` and `pydoc_data` are left out: programs wrote them, or most of them."""

STDLIB_LEAVES_OUT = {"test", "tests", "idle_test", "entities.py", "_casefix.py"}


class CorpusError(ValueError):
    """Text that cannot be read: one line that names the file, the line or row, and what to do."""


@dataclass(frozen=True)
class Source:
    """One part of a mixture: its share of the samples is weight / sum of weights, for at most max_epochs passes."""

    path: str
    weight: float = 1.0
    max_epochs: float | None = None

    @property
    def name(self) -> str:
        """A short name, the same wherever the files lie."""
        return self.path if self.path.startswith("hf:") else Path(self.path).expanduser().resolve().name


class Document(NamedTuple):
    """One text; attention and the split stop at its ends."""

    text: str
    name: str
    licence: str
    split: Literal["train", "val"]


class File(NamedTuple):
    """A file of a source."""

    name: str  # its path inside the source, with forward slashes
    path: Path
    size: int  # bytes


def parse_mixture(corpus: str) -> tuple[Source, ...]:
    """Read `PATH[:WEIGHT[:MAX_EPOCHS]],...`. Up to two numbers are taken from the right, so paths may hold colons."""
    number = r"(?::([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?))?"
    sources = []
    for part in corpus.split(","):
        path, weight, epochs = re.fullmatch(rf"\s*(.*?){number}{number}\s*", part, re.IGNORECASE | re.DOTALL).groups()
        if not path:
            raise ConfigError(f"corpus {corpus!r} has an empty part; write PATH:WEIGHT:MAX_EPOCHS,...", "data.corpus")
        source = Source(path, float(weight or 1), float(epochs) if epochs else None)
        if not all(0 < float(number) < math.inf for number in (weight or 1, epochs or 1)):
            raise ConfigError(f"corpus {part.strip()!r}: weight and max_epochs must be above 0, finite", "data.corpus")
        if path in {other.path for other in sources}:
            raise ConfigError(f"corpus {path!r} is named twice; give it one weight", "data.corpus")
        sources.append(source)
    return tuple(sources)


def place(name: str) -> float:
    """Where a hash of the name puts it in [0, 1), the same on every machine."""
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_validation(name: str, fraction: float) -> bool:
    """Whether a row of this name is held out. A larger fraction holds out the same rows and more."""
    return place(name) < fraction


def source_files(source: Source) -> list[File]:
    """The files of a source that is not remote, in the order of their places. Hidden and empty files are skipped."""
    root = Path(source.path).expanduser()
    if source.path == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for name in STDLIB for path in (root / f"{name}.py", *(root / name).rglob("*.py"))
                 if path.is_file() and not STDLIB_LEAVES_OUT.intersection(path.relative_to(root).parts)]
    elif root.is_dir():
        paths = [path for path in root.rglob("*") if (_is_records(path) or path.suffix.lower() in TEXT_SUFFIXES)
                 and path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)]
    elif root.exists():
        root, paths = root.parent, [root]
    else:
        raise ConfigError(f"corpus {source.path!r} does not exist; give `stdlib`, a file, a folder or hf:NAME",
                          "data.corpus")
    files = [File(path.relative_to(root).as_posix(), path, size) for path in paths if (size := path.stat().st_size)]
    if not files:
        raise ConfigError(f"corpus {source.path!r} holds no text; a folder is searched for .txt, .md, .py, .jsonl, "
                          ".jsonl.gz, .parquet and the like", "data.corpus")
    return sorted(files, key=lambda file: (place(file.name), file.name))


def fingerprint(source: Source) -> list:
    """What tells whether a source has changed, without reading it: names, sizes and times of its files."""
    if source.path.startswith("hf:"):
        return [source.path]
    interpreter = platform.python_version() if source.path == "stdlib" else None
    return [interpreter, [(file.name, file.size, file.path.stat().st_mtime_ns) for file in source_files(source)]]


def source_bytes(source: Source) -> int | None:
    """Bytes of text in a source, or None where only reading it would tell."""
    if source.path.startswith("hf:"):
        return None
    files = source_files(source)
    return None if any(file.path.suffix in (".gz", ".parquet") for file in files) else sum(f.size for f in files)


def documents(source: Source, config: DataConfig) -> Iterator[Document]:
    """Every document of a source, each with its split; see the head of this file. Empty texts are left out.

    Raises ConfigError where the source itself is wrong, CorpusError where something in it cannot be read.
    """
    if source.path.startswith("hf:"):
        yield from _hub_documents(source.path, config)
        return
    files = source_files(source)
    licence = "PSF-2.0" if source.path == "stdlib" else "not stated"
    held_out = _held_out([file for file in files if not _is_records(file.path)], config.val_fraction)
    for file in files:
        if _is_records(file.path):
            rows = _parquet_rows if file.path.suffix == ".parquet" else _json_rows
            yield from _row_documents(rows(file.path, config.text_field), file.name, licence, config.val_fraction)
            continue
        text = _read_text(file.path)
        cut = int(len(text) * (1 - config.val_fraction)) if len(files) == 1 else len(text) * (file.name not in held_out)
        for split, part in (("train", text[:cut]), ("val", text[cut:])):
            yield from (Document(piece, file.name, licence, split) for piece in _pieces(part))


def _held_out(files: list[File], fraction: float) -> set[str]:
    total = sum(file.size for file in files)
    chosen, size = set(), 0
    for file in files:
        if size < fraction * total and file.size <= total / 2:
            chosen.add(file.name)
            size += file.size
    return chosen


def _is_records(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {error.start}); convert it or take it out") from None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from None


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        half, end = start + PIECE // 2, start + PIECE
        marks = ((text.rfind(mark, half, end), len(mark)) for mark in ("\n\n", "\n"))
        cut = next((at + length for at, length in marks if at >= 0), end)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _row_documents(rows: Iterator[tuple[int, str]], name: str, licence: str, fraction: float) -> Iterator[Document]:
    for number, text in rows:
        row = f"{name}:{number}"
        if text:
            yield Document(text, row, licence, "val" if is_validation(row, fraction) else "train")


def _json_rows(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path} line {number}"
                if line.strip():
                    yield number, _text_of(_parse_json(line, where), text_field, where)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read beyond line {number}: {error}") from None


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise CorpusError(f"{where} is not UTF-8 text") from None
    except ValueError as error:
        raise CorpusError(f"{where} is not valid JSON: {error}") from None


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise CorpusError(f"{where} is not a JSON object")
    if text_field not in record:
        fields = ", ".join(map(repr, record)) or "nothing"
        raise CorpusError(f"{where} has no field {text_field!r}, only {fields}; set data.text_field")
    text = record[text_field]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: field {text_field!r} is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise CorpusError(f"{where}: field {text_field!r} holds half of a surrogate pair") from None
    return text


def _parquet_rows(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        columns = [text_field] if text_field in names else names  # a missing field is reported with the first row
        rows = (row for batch in table.iter_batches(1024, columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield number, _text_of(row, text_field, f"{path} row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{path} cannot be read: {_first_line(error)}") from None


def _hub_documents(path: str, config: DataConfig) -> Iterator[Document]:
    """Stream the `train` split of hf:NAME, hf:OWNER/NAME, hf:OWNER/NAME/CONFIG or hf:FOLDER."""
    try:
        import datasets
    except ImportError:
        raise CorpusError(f"{path} needs the datasets package: pip install datasets") from None
    name, subset = path.removeprefix("hf:"), None
    if not Path(name).exists() and name.count("/") == 2:
        name, subset = name.rsplit("/", 1)
    try:
        rows = datasets.load_dataset(name, subset, split="train", streaming=True)
        texts = ((i, _text_of(row, config.text_field, f"{path} row {i}")) for i, row in enumerate(rows, 1))
        yield from _row_documents(texts, path, rows.info.license or "not stated", config.val_fraction)
    except CorpusError:
        raise
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read: {_first_line(error)}") from None
