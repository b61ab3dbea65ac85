"""Shards, loader and prepare: coverage, exactness, what survives a kill, and each complaint word for word."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomai import preparation as prepare_module
from nanomai.config import ConfigError, DataConfig
from nanomai.data import BLOCK, IGNORE, Loader, Validation, Windows, make_key, permute, plan_mixture
from nanomai.preparation import prepare
from nanomai.shards import DataError, manifest_hash, open_shards, read_header, write_shard
from nanomai.tokenizer import Tokenizer, TokenizerError, get_tokenizer

ROOT = Path(__file__).parent.parent
END = 256
STEP = 10_000  # from one shard's first token to the next one's
quick = settings(max_examples=30, deadline=None)


def write_folder(folder: Path, sources: list[dict[str, list[int]]]) -> Path:
    """A prepared folder whose tokens count upwards; sources[s][split] lists the lengths of its shards."""
    described = []
    for number, splits in enumerate(sources):
        entries = {}
        for split, lengths in splits.items():
            shards = []
            for k, length in enumerate(lengths):
                path, tokens = folder / f"{split}-{number}-{k}.bin", np.arange(length) + STEP * (k + 10 * number)
                header = write_shard(path, tokens, "the tokenizer", 10**6)
                shards.append({"file": path.name, "tokens": length, "checksum": header.checksum})
            entries[split] = {"tokens": sum(lengths), "shards": shards}
        described.append({"name": f"source{number}", "splits": entries})
    manifest = {"tokenizer_hash": "the tokenizer", "end_of_text": END, "sources": described}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "hash": manifest_hash(manifest)}))
    return folder


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The permutation


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@quick
def test_permute_is_a_bijection(n, key):
    image = permute(np.arange(n), n, make_key(key))
    assert np.array_equal(np.sort(image), np.arange(n))


@given(st.integers(1, 2**60), st.integers(0, 2**32), st.lists(st.integers(0, 2**60), min_size=1, max_size=20))
@quick
def test_permute_of_a_few_out_of_many(n, key, index):
    index = np.unique(np.array(index) % n)
    image = permute(index, n, make_key(key))
    assert len(np.unique(image)) == len(index) and image.min() >= 0 and image.max() < n
    keys = make_key(key, np.arange(len(index)))
    assert permute(index, n, keys).tolist() == [int(permute(index[i : i + 1], n, keys[i : i + 1])[0])
                                                for i in range(len(index))]


def test_permute_looks_random():
    """Where 0 lands and how far neighbours stay apart, over 4,000 keys: a chi-square and a mean, both well inside."""
    n, keys = 50, make_key(7, np.arange(4000))
    first, second = (permute(np.full(4000, i), n, keys) for i in (0, 1))
    chi_square = ((np.bincount(first, minlength=n) - 80) ** 2 / 80).sum()
    assert chi_square < 100  # 49 degrees of freedom: 1 in 50,000 exceeds it
    assert abs(np.abs(first - second).mean() - (n + 1) / 3) < 1


def test_the_order_of_samples_never_changes():
    """A run that was begun with an earlier version must go on with the same samples."""
    assert permute(np.arange(12), 12, make_key(1, 2, 3)).tolist() == [5, 9, 10, 4, 3, 0, 6, 7, 11, 2, 1, 8]


# The mixture


@given(st.lists(st.tuples(st.floats(0.05, 1), st.none() | st.integers(1, 9000)), min_size=1, max_size=5))
@quick
def test_the_phases_of_a_mixture_use_all_that_is_there(parts):
    weights, available = zip(*parts, strict=True)
    phases, total = plan_mixture(weights, available)
    assert (total is None) == (None in available) and len(phases) <= 2 * len(parts) + 1
    for phase, following in itertools.pairwise(phases):
        assert phase.quotas.sum() == BLOCK and (following.start - phase.start) % BLOCK == 0
        used = (following.start - phase.start) // BLOCK * phase.quotas
        assert np.array_equal(following.before, phase.before + used) and used.sum() == following.start - phase.start
    if total is not None:
        assert total == sum(available)
        last = phases[-1]
        blocks = (total - last.start) // last.quotas.sum()
        assert np.array_equal(last.before + blocks * last.quotas, available)


def test_quotas_are_the_largest_remainders():
    assert [phase.quotas.tolist() for phase in plan_mixture([3, 1], [None, None])[0]] == [[768, 256]]
    assert plan_mixture([1, 1, 1], [None] * 3)[0][0].quotas.tolist() == [342, 341, 341]
    phases, total = plan_mixture([0.5, 0.25, 0.25], [None, 300, None])
    assert [(p.start, p.quotas.tolist()) for p in phases] == [
        (0, [512, 256, 256]), (1024, [653, 44, 327]), (2048, [683, 0, 341])] and total is None


# The loader


@given(st.lists(st.integers(2, 900), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 2**40))
@quick
def test_each_window_comes_once_an_epoch(tmp_path_factory, lengths, t, seed):
    folder = write_folder(tmp_path_factory.mktemp("corpus"), [{"train": [*lengths, 60], "val": []}])
    loader = Loader(folder, t, seed)
    n = len(loader.sources[0])
    epochs = [loader.samples(epoch * n, n) for epoch in range(2)]
    expected = sorted(STEP * k + t * i for k, length in enumerate([*lengths, 60]) for i in range((length - 1) // t))
    assert [sorted(batch.ids[:, 0].tolist()) for batch in epochs] == [expected] * 2
    assert all(torch.equal(batch.targets, batch.ids + 1) for batch in epochs)
    if n > 20:
        assert not same(*epochs)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    shards = [{"train": [5000, 3000], "val": [100]}, {"train": [9000], "val": []}, {"train": [500], "val": [50, 7]}]
    return write_folder(tmp_path_factory.mktemp("mixture"), shards)


def load(folder, **kwargs):
    return Loader(folder, 4, **{"seed": 3, "weights": [0.5, 0.3, 0.2], "max_epochs": [None, None, 2.5], **kwargs})


def source_of(batch):
    return (batch.ids[:, 0] // (10 * STEP)).numpy()


def test_quotas_hold_in_every_block_until_a_source_is_used_up(mixture):
    loader = load(mixture)
    blocks = [np.bincount(source_of(loader.samples(b * BLOCK, BLOCK)), minlength=3).tolist() for b in range(4)]
    assert blocks == [[512, 307, 205], [574, 345, 105], [640, 384, 0], [640, 384, 0]]
    assert loader.n_samples is None and int(2.5 * (499 // 4)) == 205 + 105
    small = loader.samples(0, 2 * BLOCK).ids[:, 0].numpy()
    small = small[small >= 20 * STEP]
    assert len(np.unique(small[:124])) == len(np.unique(small[124:248])) == 124 and len(np.unique(small[248:])) == 62


def test_a_sample_is_a_function_of_its_number(mixture):
    whole = load(mixture).samples(0, 3000)
    generator = np.random.default_rng(0)
    other = load(mixture)
    for _ in range(30):
        start, count = int(generator.integers(0, 2900)), int(generator.integers(1, 100))
        assert same(other.samples(start, count), [x[start : start + count] for x in whole])


def test_identity_is_data_mixture_seed_and_length(mixture, tmp_path):
    loaders = [load(mixture), load(mixture, seed=4), load(mixture, weights=[1, 1, 1]),
               load(mixture, max_epochs=[1, 1, 1]), Loader(mixture, 5, 3, [0.5, 0.3, 0.2], [None, None, 2.5]),
               load(write_folder(tmp_path, [{"train": [500], "val": []}] * 3))]
    assert len({loader.identity for loader in loaders}) == len(loaders)
    assert load(mixture).identity == loaders[0].identity
    assert not same(loaders[0].samples(0, 64), loaders[1].samples(0, 64))


@pytest.mark.parametrize("world", [1, 2, 8])
def test_ranks_share_each_batch_and_a_resumed_run_goes_on(mixture, world):
    counts = [8, 8, 16, 16, 64, 8]  # the batch grows on the way
    whole = load(mixture).samples(0, sum(counts))
    ranks = [list(load(mixture).batches(0, counts, rank, world)) for rank in range(world)]
    for step, count in enumerate(counts):
        start = sum(counts[:step])
        joined = [torch.cat(parts) for parts in zip(*(batches[step] for batches in ranks), strict=True)]
        assert same(joined, [x[start : start + count] for x in whole])
    resumed = list(load(mixture).batches(sum(counts[:3]), counts[3:], 0, world))
    assert all(same(a, b) for a, b in zip(resumed, ranks[0][3:], strict=True))


def test_read_ahead_prepares_while_nobody_waits(mixture, monkeypatch):
    loader, asked = load(mixture), []
    monkeypatch.setattr(loader, "samples", lambda start, count: asked.append(start))
    batches = loader.batches(0, [8] * 20, depth=3)
    for step in range(5):
        next(batches)
        deadline = time.monotonic() + 10
        while asked != [8 * i for i in range(step + 4)] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert asked == [8 * i for i in range(step + 4)]


def test_read_ahead_stops_when_it_is_left_and_passes_errors_on(mixture):
    loader = load(mixture, max_epochs=[1, 1, 1])
    batches = loader.batches(0, iter(lambda: 8, None))  # without end
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
    with pytest.raises(DataError, match="max_epochs allows 4371"):
        list(loader.batches(4000, [400]))
    with pytest.raises(DataError) as error:
        list(loader.batches(0, [9], 0, 2))
    assert str(error.value) == ("a batch of 9 samples cannot be shared by 2 ranks; "
                                "make train.batch_tokens a multiple of 2 sequences")


def test_a_run_that_needs_more_than_the_caps_allow(mixture):
    loader = load(mixture, max_epochs=[1, 1, 1])
    assert loader.n_samples == sum(map(len, loader.sources)) == 4371
    loader.require(4371)
    assert len(np.unique(loader.samples(0, 4371).ids[:, 0])) == 4371
    with pytest.raises(DataError) as error:
        loader.require(4372)
    assert str(error.value) == ("the run needs 4372 samples and max_epochs allows 4371; "
                                "raise max_epochs in data.corpus or lower train.steps")


def test_documents_are_numbered_and_the_end_is_a_target(tmp_path):
    tokens = [END, 1, 2, 3, END, 4, 5, END, 6, 7, 8, 9]
    folder = write_folder(tmp_path, [{"train": [5], "val": []}])
    loader = Loader(folder, 2)
    loader.sources = [Windows([np.array(tokens)], 11)]
    loader.phases, _ = plan_mixture([1], [None])
    batch = loader.samples(0, 1)
    assert batch.ids.tolist() == [tokens[:-1]] and batch.targets.tolist() == [tokens[1:]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
    assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.int32]


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 7), st.integers(1, 3))
@quick
def test_validation_predicts_each_token_once(tmp_path_factory, lengths, t, size, world):
    folder = write_folder(tmp_path_factory.mktemp("val"), [{"train": [9], "val": lengths}])
    val = Validation(folder, t)
    ranks = [list(val.batches(size, None, rank, world)) for rank in range(world)]
    targets = torch.cat([batch.targets.flatten() for batches in ranks for batch in batches])
    expected = [STEP * k + i for k, length in enumerate(lengths) for i in range(1, length)]
    assert sorted(targets[targets != IGNORE].tolist()) == expected
    assert all([b.ids.shape for b in batches] == [b.ids.shape for b in ranks[0]] for batches in ranks)
    assert all(b.ids.min() >= 0 for batches in ranks for b in batches)
    if world == 1:
        assert targets[targets != IGNORE].tolist() == expected  # in order


def test_a_part_of_the_validation_is_spread_over_it(tmp_path):
    val = Validation(write_folder(tmp_path, [{"train": [9], "val": [1000]}]), 10)
    firsts = torch.cat([batch.ids[:, 0] for batch in val.batches(4, 10)]).tolist()
    assert firsts == list(range(0, 1000, 100))


# Shards on disk


@given(st.lists(st.integers(0, 299), min_size=1), st.sampled_from([300, 65_536, 65_537, 200_000]))
@quick
def test_shards_are_read_back(tmp_path_factory, tokens, vocab_size):
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    written = write_shard(path, np.array(tokens), "h" * 32, vocab_size, 7, "t" * 32)
    assert read_header(path) == written and written.item_bytes == (2 if vocab_size <= 65_536 else 4)
    assert np.fromfile(path, f"<u{written.item_bytes}", offset=256).tolist() == tokens


REPAIR = "; delete its folder and run `nanomai prepare` again"


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "{path} is missing"),
    (lambda path: truncate(path, 400), "{path} is truncated"),
    (lambda path: truncate(path, 100), "{path} is truncated"),
    (lambda path: truncate(path, 0), "{path} is truncated"),
    (lambda path: path.write_bytes(b"text"), "{path} is not a token shard"),
    (lambda path: flip(path, 300), "{path} is corrupt (its checksum is wrong)"),
    (lambda path: flip(path, 8), "{path} has shard version 0, not 1"),
    (lambda path: write_shard(path, np.arange(0), "the tokenizer", 9), "{path} is empty"),
    (lambda path: write_shard(path, np.arange(100), "other", 10**6), "{path} was made with another tokenizer"),
    (lambda path: write_shard(path, np.arange(99), "the tokenizer", 10**6), "{path} is not the shard that "
                                                                            "manifest.json lists"),
])
def test_a_damaged_shard_is_named_before_training(tmp_path, damage, message):
    folder = write_folder(tmp_path, [{"train": [100, 100], "val": []}])
    damage(folder / "train-0-1.bin")
    with pytest.raises(DataError) as error:
        Loader(folder, 8)
    assert str(error.value) == message.format(path=folder / "train-0-1.bin") + REPAIR


def test_without_verify_only_contents_are_trusted(tmp_path):
    folder = write_folder(tmp_path, [{"train": [100], "val": []}])
    flip(folder / "train-0-0.bin", 300)
    assert open_shards(folder, "train", verify=False)[0][0][11] == 10  # bytes 300..303 hold token 11
    truncate(folder / "train-0-0.bin", 300)
    with pytest.raises(DataError, match="is truncated"):
        open_shards(folder, "train", verify=False)


@pytest.mark.parametrize("text, message", [
    (None, "is missing; run `nanomai prepare`"),
    ("{", "is corrupt" + REPAIR),
    ("[]", "is corrupt" + REPAIR),
    ('{"hash": "0"}', "is corrupt" + REPAIR),
])
def test_a_damaged_manifest_is_named(tmp_path, text, message):
    if text:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError) as error:
        Loader(tmp_path, 8)
    assert str(error.value) == f"{tmp_path / 'manifest.json'} {message}"


def test_too_little_for_one_window(tmp_path, mixture):
    folder = write_folder(tmp_path, [{"train": [8], "val": [1]}])
    assert len(Loader(folder, 7).sources[0]) == 1
    for call, message in [
        (lambda: Loader(folder, 8), "source0 has 8 training tokens, too few for a window of 9; "
                                    "give more text or a shorter train.sequence_length"),
        (lambda: Validation(folder, 8), f"{folder} has no validation text; raise data.val_fraction"),
        (lambda: load(mixture, weights=[1, 1, 1e-4]), "source2 gets none of the 1024 samples of a block; "
                                                      "raise its weight or max_epochs"),
        (lambda: load(mixture, max_epochs=[1, 1e-9, 1]), "source1 gets none of the 1024 samples of a block; "
                                                         "raise its weight or max_epochs"),
    ]:
        with pytest.raises(DataError) as error:
            call()
        assert str(error.value) == message


# Prepare


def write_texts(folder: Path, n: int = 60) -> Path:
    if folder.exists():  # written twice, the files would have new times
        return folder
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.txt").write_text(f"Document {i} says {i * i}, é and 漢.\n" * (20 + i), encoding="utf-8")
    return folder


def config_for(tmp_path, **kwargs):
    corpus = str(write_texts(tmp_path / "texts"))
    return DataConfig(**{"corpus": corpus, "tokenizer": "bytes", "folder": str(tmp_path / "data"), **kwargs})


def contents(prepared, split):
    tokens = np.concatenate([shard for source in open_shards(prepared.folder, split) for shard in source]).tolist()
    return "".join(prepared.tokenizer.decode([token]) if token == END else chr(token) for token in tokens)


def test_prepare_keeps_every_document_and_is_found_again(tmp_path):
    config = config_for(tmp_path)
    prepared = prepare(config, 300, shard_bytes=5000, show=False)
    source, = prepared.manifest["sources"]
    texts = {path.read_text(encoding="utf-8") for path in (tmp_path / "texts").iterdir()}
    kept = [contents(prepared, split).split("<|endoftext|>")[1:] for split in ("train", "val")]
    assert {text.encode("latin-1").decode() for split in kept for text in split} == texts
    assert [source["splits"][split]["documents"] for split in ("train", "val")] == [len(split) for split in kept]
    assert sum(source["splits"][split]["bytes"] for split in ("train", "val")) == sum(len(t.encode()) for t in texts)
    assert len(source["splits"]["train"]["shards"]) > 10 and source["licences"] == ["not stated"]
    before = {path: path.stat().st_mtime_ns for path in prepared.folder.iterdir()}
    again = prepare(config, 300, shard_bytes=5000, show=False)
    assert again.manifest == prepared.manifest and before == {p: p.stat().st_mtime_ns for p in again.folder.iterdir()}
    assert len(prepared.loader(16).sources[0]) > 100 and len(prepared.validation(16).windows) > 10


def test_other_text_or_settings_are_other_data_but_other_weights_are_not(tmp_path):
    config = config_for(tmp_path)
    (tmp_path / "more.txt").write_text("more text\n" * 400)
    texts = config.corpus

    def folder(vocab_size=300, **kwargs):
        return prepare(config_for(tmp_path, **kwargs), vocab_size, show=False).folder.name

    assert folder().startswith("texts-") and folder(corpus=f"{texts},{tmp_path}/more.txt").startswith("texts-and-1-")
    names = [folder(), folder(val_fraction=0.3), folder(265, tokenizer="bpe"),
             folder(corpus=f"{texts},{tmp_path}/more.txt")]
    assert len(set(names)) == 4
    assert folder(corpus=f"{texts}:0.9,{tmp_path}/more.txt:0.1:4") == names[3]
    with (tmp_path / "more.txt").open("a") as file:
        file.write("and more")
    assert folder(corpus=f"{texts},{tmp_path}/more.txt") != names[3]


def test_a_mixture_is_loaded_by_its_weights(tmp_path):
    texts = config_for(tmp_path).corpus
    (tmp_path / "more.txt").write_text("more text\n" * 400)
    prepared = prepare(config_for(tmp_path, corpus=f"{texts}:3,{tmp_path}/more.txt:1:2"), 300, show=False)
    loader = prepared.loader(16)
    assert [source["name"] for source in prepared.manifest["sources"]] == ["texts", "more.txt"]
    assert loader.phases[0].quotas.tolist()[1] == 256 and loader.n_samples is None


def test_a_tokenizer_is_trained_on_the_training_split_only(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("abcdefgh " * 900 + "ZZZZZZZZ " * 100)  # the last tenth is validation
    config = DataConfig(corpus=str(tmp_path / "book.txt"), val_fraction=0.1, folder=str(tmp_path))
    prepared = prepare(config, 264, show=False)
    assert prepared.tokenizer.vocab_size == 264 and prepared.tokenizer.tokens[-1].strip() == b"abcdefgh"
    assert Tokenizer.load(prepared.folder / "tokenizer.json").hash == prepared.manifest["tokenizer_hash"]
    other = prepare(DataConfig(corpus=config.corpus, folder=str(tmp_path), val_fraction=0.1,
                               tokenizer=str(prepared.folder / "tokenizer.json")), 1000, show=False)
    assert other.manifest["hash"] == prepared.manifest["hash"] and other.folder != prepared.folder
    monkeypatch.setattr(prepare_module, "SAMPLE_BYTES", 100)
    sample = list(prepare_module._training_sample(other.sources, config))
    assert sample == ["abcdefgh " * 11 + "a"]


def test_processes_and_threads_write_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "THREADS_BELOW", 0)
    one, two = (prepare(config_for(tmp_path, workers=workers, folder=str(tmp_path / str(workers))), 300, 20_000, False)
                for workers in (1, 2))
    assert one.manifest == two.manifest and len(list(one.folder.iterdir())) > 5
    assert capsys.readouterr().out == ""


def test_prepare_tells_its_speed(tmp_path, capsys):
    (tmp_path / "long.txt").write_text("all work and no play\n" * 100_000)
    prepare(DataConfig(corpus=str(tmp_path / "long.txt"), tokenizer="bytes", folder=str(tmp_path), workers=2), 300)
    assert "MB/s with 2 threads; a terabyte would take this machine" in capsys.readouterr().out


SLOW = """
import sys, time
from pathlib import Path
from nanomai import preparation as module, shards
from nanomai.config import DataConfig
write = module.encode_shard
def slow(*args):
    time.sleep(float(sys.argv[3]))
    return write(*args)
module.encode_shard = slow
config = DataConfig(corpus=sys.argv[1], tokenizer="bytes", folder=sys.argv[2], workers=1)
print(module.prepare(config, 300, shard_bytes=5000, show=False).manifest["hash"])
"""


def start_slow(tmp_path, folder, delay):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "texts"), str(folder), str(delay)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_prepare_goes_on_where_it_was(tmp_path):
    config = config_for(tmp_path, folder=str(tmp_path / "killed"), workers=1)
    process = start_slow(tmp_path, tmp_path / "killed", 0.1)
    while len(shards := sorted(tmp_path.glob("killed/*/*.bin"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("killed/*/manifest.json"))
    kept = {path: path.stat().st_ino for path in shards}
    truncate(shards[2], 300)  # as a disk may lose it
    leftover = shards[0].with_name(".train-0-00009.bin.1.tmp")
    leftover.touch()
    os.utime(leftover, (0, 0))
    prepared = prepare(config, 300, shard_bytes=5000, show=False)
    unbroken = prepare(config_for(tmp_path, workers=1), 300, shard_bytes=5000, show=False)
    assert prepared.manifest == unbroken.manifest and len(prepared.loader(16, verify=True).sources[0]) > 100
    assert [path.stat().st_ino == inode for path, inode in kept.items()] == [k != 2 for k in range(len(kept))]
    assert not leftover.exists()


def test_two_at_once_do_not_harm_each_other(tmp_path):
    config = config_for(tmp_path)
    both = [start_slow(tmp_path, tmp_path / "both", delay) for delay in (0.01, 0.011)]
    printed = [process.communicate() for process in both]
    expected = prepare(config, 300, shard_bytes=5000, show=False).manifest["hash"]
    assert [out.strip() for out, _ in printed] == [expected] * 2, printed
    found = prepare(config_for(tmp_path, folder=str(tmp_path / "both")), 300, shard_bytes=5000, show=False)
    assert len(found.loader(9).sources[0]) > 100 and len(list(tmp_path.glob("both/*"))) == 1


PARENT = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from nanomai.shards import start_worker
import os
pool = ProcessPoolExecutor(1, get_context("spawn"), start_worker, (None,))
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(60)
"""


def test_workers_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(500):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("the worker outlived its parent by five seconds")


def test_what_prepare_refuses(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "blank.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "file").touch()
    texts, rows = config_for(tmp_path).corpus, tmp_path / "rows.jsonl"
    for kwargs, vocab_size, kind, message in [
        ({}, 256, ConfigError, "tokenizer 'bytes' has 257 tokens and the model only 256; "
                               "set model.vocab_size to 257 or more"),
        ({"corpus": str(rows)}, 300, ConfigError, f"corpus '{rows}' has no document in validation: raise "
                                                  "data.val_fraction or add documents"),
        ({"corpus": str(rows), "val_fraction": 0.999}, 300, ConfigError,
         f"corpus '{rows}' has no document left to train on: lower data.val_fraction or add documents"),
        ({"corpus": f"{tmp_path}/blank.jsonl"}, 300, ConfigError, f"corpus '{tmp_path}/blank.jsonl' holds no text"),
        ({"tokenizer": "gpt3"}, 300, TokenizerError, "unknown tokenizer 'gpt3'; did you mean 'gpt2'? valid are "
                                                     "bpe, bytes, gpt2, cl100k_base, o200k_base, or a saved "
                                                     "tokenizer's file"),
        ({"folder": f"{tmp_path}/file"}, 300, ConfigError, "{folder} cannot be written: Not a directory; "
                                                           "set data.folder"),
    ]:
        config = config_for(tmp_path, **{"corpus": texts, **kwargs})
        with pytest.raises(kind) as error:
            prepare(config, vocab_size, show=False)
        if "{folder}" in message:
            assert str(error.value).endswith(message.removeprefix("{folder}"))
        else:
            assert str(error.value) == message


def test_a_full_disk_is_one_line(tmp_path):
    config = config_for(tmp_path)
    code = ("import resource, sys; from nanomai.config import DataConfig; from nanomai.preparation import prepare\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            f"config = DataConfig(corpus={config.corpus!r}, tokenizer='bytes', folder={config.folder!r}, workers=1)\n"
            "try:\n    prepare(config, 300, show=False)\nexcept ValueError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    folder, = (tmp_path / "data").iterdir()
    assert done.stdout == f"{folder}/val-0-00000.bin cannot be written: File too large\n", done
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]


def test_another_tokenizer_in_the_folder_is_refused(tmp_path):
    config = config_for(tmp_path)
    prepared = prepare(config, 300, show=False)
    other = Tokenizer(r"[\s\S]", [bytes([i]) for i in range(256)], {"<|endoftext|>": 256})
    other.save(prepared.folder / "tokenizer.json")
    assert get_tokenizer("bytes").hash == prepared.tokenizer.hash
    with pytest.raises(DataError) as error:
        prepare(config, 300, show=False)
    assert str(error.value) == (f"{prepared.folder}/tokenizer.json is not the tokenizer of {prepared.folder}; "
                                "delete the folder and run `nanomai prepare` again")
