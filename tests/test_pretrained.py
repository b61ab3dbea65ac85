"""Tokenizers of published models: the library's ids, its text piece by piece, and all that is done with a run."""

import json
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from test_hub import HARD, spoil
from test_model_parity import SIZES
from tiny_run import tiny, write_tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import nanomai
from nanomai import cli, sampling
from nanomai.evaluation import evaluate_text, validation_text
from nanomai.hub import HubError, from_hf, import_run, to_hf
from nanomai.hub.vocabulary import read_tokenizer
from nanomai.pretrained import PretrainedTokenizer, load_tokenizer
from nanomai.sampling import stream_text
from nanomai.tokenizer import TokenizerError

TEXTS = [Path(cli.__file__).read_text(), "naïve café, the cat sat on the mat 東京 👩\u200d👩", *HARD]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NASTY = [*HARD, " a", "  a", "a ", "\n\na", "<s>", "a </s>b", "▁a▁", "<0x41>", "a" * 1000]


def settings_of(**settings):
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | settings


def trained(tokenizer, trainer):
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentence_piece(extra=()):
    """BPE as Llama-2's file has it: a blank before the text, all blanks as ▁, no words, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # only so that training is quick
    trained(tokenizer, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + BYTES, limit_alphabet=60,
                                           show_progress=False))
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]  # the trainer lists the bytes too
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.add_tokens(list(extra))
    return tokenizer


def opened_by(name, number):
    return processors.TemplateProcessing(single=f"{name} $A", pair=f"{name} $A {name} $B",
                                         special_tokens=[(name, number)])


def llama_2():
    tokenizer = sentence_piece()
    tokenizer.post_processor = opened_by("<s>", 1)
    return tokenizer, settings_of(bos_token="<s>", eos_token={
        "__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "single_word": False,
        "normalized": False})  # as transformers 4 wrote it


def mistral():
    """The newer way to say the same: Metaspace in place of a normalizer. What was set for a batch is in the file."""
    tokenizer = sentence_piece()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_token="<unk>", pad_id=0, length=9)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = opened_by("<s>", 1)
    return tokenizer, settings_of(bos_token="<s>", eos_token="</s>")


def phi_3():
    """Nothing before a text, an end that was added, and one for each turn of a conversation."""
    extra = [AddedToken("<|endoftext|>", special=True), AddedToken("<|end|>", special=True, rstrip=True)]
    return sentence_piece(extra), settings_of(bos_token="<s>", eos_token="<|endoftext|>")


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trained(tokenizer, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>",
                                               show_progress=False))
    return tokenizer, settings_of(eos_token="</s>")


def byte_level(special, size=400):
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, trainers.BpeTrainer(vocab_size=size, show_progress=False,
                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(special)
    return tokenizer


def llama_3():
    tokenizer = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    number = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False),
                                                    opened_by("<|begin_of_text|>", number)])
    return tokenizer, settings_of(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def phi_2():
    """Byte-level BPE with runs of blanks that no merge makes."""
    tokenizer = byte_level(["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(9, 1, -1)])
    return tokenizer, settings_of(eos_token="<|endoftext|>")


def shuffled():
    """Byte-level BPE whose ids do not follow its merges."""
    saved = json.loads(byte_level([]).to_str())
    numbers = list(range(len(saved["model"]["vocab"])))
    random.Random(0).shuffle(numbers)
    saved["model"]["vocab"] = dict(zip(saved["model"]["vocab"], numbers, strict=True))
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer, settings_of(eos_token="<|endoftext|>")


KINDS = [llama_2, mistral, phi_3, unigram, llama_3, phi_2, shuffled]
OPENING = {llama_2: "<s>", mistral: "<s>", llama_3: "<|begin_of_text|>"}


def write(folder, kind):
    tokenizer, settings = kind()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def both(request, tmp_path_factory):
    """The kind, the library's tokenizer as transformers loads it, and ours."""
    folder = write(tmp_path_factory.mktemp("kinds") / "one", request.param)
    return request.param, hf.AutoTokenizer.from_pretrained(folder), read_tokenizer(folder)


def test_ids_and_text_are_those_of_the_library(both):
    _, theirs, ours = both
    assert isinstance(ours, PretrainedTokenizer)
    for text in NASTY:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], repr(text)
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
    assert ours.vocab_size == len(theirs)

    draw = random.Random(0)
    for _ in range(100):
        ids = draw.choices(range(ours.vocab_size), k=8)
        assert "\ufffd" in theirs.decode(ids) or ours.decode(ids) == theirs.decode(ids), ids


def test_what_stands_before_a_text(both):
    kind, theirs, ours = both
    first = OPENING.get(kind)
    assert ours.opening == [ours.end_of_text if first is None else theirs.convert_tokens_to_ids(first)]
    for text in ("", "the cat", "\n"):
        assert theirs(text)["input_ids"] == (ours.opening if first else []) + ours.encode(text)
    assert ours.stop_tokens == [theirs.eos_token_id]


def test_bytes_of_tokens(both):
    kind, _, ours = both
    added = kind in (llama_2, mistral, phi_3)  # the blank before a text
    for text in ("the cat", "東京 \t\n", "👩\u200d👩  <s>"):
        assert kind is unigram or sum(ours.token_bytes[token] for token in ours.encode(text)) == (
            len(text.encode()) + added)
    assert {ours.token_bytes[token] for token in ours.special_tokens.values()} == {0}


def scripted(monkeypatch, ours, script):
    """Lets a model that is not there write `script`."""
    def stream(model, prompts, max_tokens, stop_tokens=(), vocab_size=None):
        assert prompts[0][:1] == ours.opening and [*stop_tokens] == ours.stop_tokens
        assert vocab_size == ours.vocab_size
        yield from ([token] for token in script)

    monkeypatch.setattr(sampling, "stream", stream)


@pytest.mark.parametrize("prompt", ["", "the cat", " ", "a\n"])
def test_pieces_make_the_whole(both, prompt, monkeypatch):
    _, _, ours = both
    before = ours.encode(prompt)
    for text in NASTY:
        script = ours.encode(text)
        scripted(monkeypatch, ours, script)
        pieces = [*stream_text(None, ours, prompt, 99)]
        assert ours.decode(before) + "".join(pieces) == ours.decode(before + script)
        assert not any("\ufffd" in piece for piece in pieces)
    draw = random.Random(0)
    for _ in range(100):
        script = draw.choices(range(ours.vocab_size), k=8)
        scripted(monkeypatch, ours, script)
        assert ours.decode(before) + "".join(stream_text(None, ours, prompt, 99)) == ours.decode(before + script)


def test_a_saved_one(both, tmp_path):
    _, _, ours = both
    ours.save(tmp_path / "tokenizer.json")
    for again in (load_tokenizer(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(ours))):
        assert (again.hash, again.files, again.stop_tokens) == (ours.hash, ours.files, ours.stop_tokens)
        assert again.encode("a</s><|endoftext|>") == ours.encode("a</s><|endoftext|>")


# --- Runs -------------------------------------------------------------------------------------------------------------


def model_folder(folder, kind, **settings):
    """A model of random weights that knows the tokens of its tokenizer."""
    write(folder, kind)
    torch.manual_seed(0)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"vocab_size": size} | settings))
    for weight in theirs.parameters():
        weight.data.mul_(8)  # so that it does not write one token only
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [llama_2, llama_3, phi_3], ids=lambda kind: kind.__name__)
def test_a_run_and_back(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "in", kind)
    assert cli.main(["import", "in", "run"]) == 0
    model, ours, _ = nanomai.load_run("run")
    loaded, theirs = (auto.from_pretrained("in") for auto in (hf.AutoModelForCausalLM, hf.AutoTokenizer))
    prompt = theirs("the cat", return_tensors="pt")["input_ids"]
    written = loaded.generate(prompt, max_new_tokens=12, do_sample=False)[0]
    assert len({*written.tolist()}) > 8
    if kind is not phi_3:  # which begins without a token; here the end of a text opens the next
        pieces = "".join(stream_text(model, ours, "the cat", 12, temperature=0))
        assert "the cat" + pieces == ours.decode(written[1:])
    capsys.readouterr()
    assert cli.main(["sample", "run", "--prompt", "the cat", "--max-tokens", "9", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    (tmp_path / "text").write_text("the cat sat on a mat 東京", encoding="utf-8")
    assert cli.main(["eval", "run", "--text", "text", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == len((tmp_path / "text").read_bytes()) and found["bits_per_byte"] == pytest.approx(
        found["loss"] * found["tokens"] / found["bytes"] / 0.6931471805599453)

    assert cli.main(["export", "run", "out"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    again = hf.AutoModelForCausalLM.from_pretrained("out")
    assert again.generation_config.eos_token_id == ours.end_of_text
    assert torch.equal(again.generate(prompt, max_new_tokens=12, do_sample=False)[0], written)
    assert hf.AutoTokenizer.from_pretrained("out")("the cat")["input_ids"] == prompt[0].tolist()
    assert from_hf("out")[1].hash == ours.hash


def test_bits_per_byte_are_of_the_text(tmp_path):
    """The blank that is put before it, or a character that is normalised away, is no byte of it."""
    model, ours = from_hf(model_folder(tmp_path / "in", unigram))
    text = "\ufb01n ½ x"
    assert ours.decode(ours.encode(text)) != text
    found = evaluate_text(model, ours, text)
    ids = torch.tensor([[*ours.opening, *ours.encode(text)]])
    with torch.no_grad():
        nats = -model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().item()
    assert found.bits_per_byte == pytest.approx(nats / 0.6931471805599453 / len(text.encode()), rel=1e-5)


def test_all_ends_of_a_text(tmp_path, monkeypatch):
    """A list in generation_config.json is what `generate` of transformers obeys too."""
    folder = model_folder(tmp_path / "in", phi_3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [601, 600, 77]}))
    model, ours = from_hf(folder)
    assert ours.stop_tokens == [601, 600] and ours.end_of_text == 601, "77 is an ordinary token"
    written = iter([ours.encode("cat")[0], 600])
    monkeypatch.setattr(sampling, "choose", lambda *_: torch.tensor([next(written)]))
    assert "".join(stream_text(model, ours, "", 9)) == ours.decode(ours.encode("cat")[:1])
    to_hf(model, tmp_path / "out", ours)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [601, 600]
    assert from_hf(tmp_path / "out")[1].stop_tokens == [601, 600]


def test_no_end_of_text(tmp_path):
    folder = model_folder(tmp_path / "in", phi_3)
    spoil(folder, "tokenizer_config.json", lambda settings: settings.pop("eos_token"))
    model, ours = from_hf(folder)
    to_hf(model, tmp_path / "out", ours)
    with pytest.raises(TokenizerError, match=r"has no end of text; name an eos_token in the tokenizer_config\.json"):
        next(stream_text(model, ours, "a", 9))


def test_training_goes_on(tmp_path, monkeypatch):
    """From an imported run, on texts that its tokenizer cuts: </s><s> stands between them."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    folder = model_folder(tmp_path / "in", llama_2, num_hidden_layers=2, head_dim=16, hidden_size=32,
                          num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
                          tie_word_embeddings=True)
    run = import_run(folder, tmp_path / "start")
    imported = nanomai.load_run(run)
    config = tiny(data__tokenizer=str(run / "tokenizer.json"), model__vocab_size=600, train__init_from=str(run),
                  model__norm_eps=imported.config.model.norm_eps, optim__lr=1e-4)
    result = nanomai.train(config)
    model, ours, config = nanomai.load_run(result.run_dir)
    assert ours.hash == imported.tokenizer.hash
    moved = max((a - b).abs().max() for a, b in zip(model.parameters(), imported.model.parameters(), strict=True))
    assert 0 < moved < 0.1
    prepared = nanomai.prepare(config.data, 600, show=False)
    shard = prepared.loader(32).sources[0].shards[0].tolist()
    assert shard[:2] == [2, 1] and shard.count(1) == shard.count(2) > 3
    assert ours.decode(shard[2 : shard.index(2, 2)]) in [path.read_text() for path in Path("text").iterdir()]
    written = validation_text(prepared.validation(32), ours)
    assert b"<s>" not in written and b"</s>" not in written and b" cat " in written
    assert cli.main(["eval", str(result.run_dir)]) == 0


# --- Faults -----------------------------------------------------------------------------------------------------------


def template_without_tokens(saved):
    saved["post_processor"]["special_tokens"] = {}


def abort(saved):
    """The library cuts a prefix of one byte off a token that begins with one of three."""
    saved["model"].update(continuing_subword_prefix="x", vocab={"a": 0, "日": 1}, merges=[["a", "日"]])


def looks_around(saved):
    """A decoder that makes of two tokens what neither is alone."""
    saved["decoder"]["decoders"].append({"type": "Replace", "pattern": {"String": "a b"}, "content": "c"})


FAULTS = {
    "crash": (template_without_tokens, "the tokenizers library crashes on it"),
    "abort": (abort, "the tokenizers library crashes on it"),
    "no model": (lambda saved: saved.pop("model"), "the tokenizers library cannot read it: "),
    "no kind": (lambda saved: saved["model"].update(type="BPF"), "the tokenizers library cannot read it: "),
    "no decoder": (lambda saved: saved.update(decoder=None), "it has no decoder"),
    "other decoder": (looks_around, "its decoder is of a kind that nanomai does not know"),
    "no list": (lambda saved: saved.update(added_tokens=None), "is not a tokenizer of the tokenizers library (TypeE"),
    "no ids": (lambda saved: saved["added_tokens"][0].pop("id"), "is not a tokenizer of the tokenizers library (KeyE"),
    "a far id": (lambda saved: saved["model"]["vocab"].update(far=2**32 - 1), "has 4294967296 tokens, and the model"),
    "a farther id": (lambda saved: saved["model"]["vocab"].update(far=2**32), "the tokenizers library cannot read it"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("faults") / "in", llama_2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(fault, llama, tmp_path, capfd):
    plant, message = FAULTS[fault]
    shutil.copytree(llama, tmp_path / "in")
    spoil(tmp_path / "in", "tokenizer.json", plant)
    assert cli.main(["import", str(tmp_path / "in"), str(tmp_path / "run")]) == 1
    said = capfd.readouterr().err
    assert message in said and said.count("\n") == 1 and "tokenizer.json" in said and len(said) < 400, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [
    lambda saved: saved["stop_tokens"].append(1), lambda saved: saved.pop("files"),
    lambda saved: saved["files"].update({"../x": ""}), lambda saved: saved.update(files=[])])
def test_a_damaged_one(change, llama, tmp_path):
    read_tokenizer(llama).save(tmp_path / "tokenizer.json")
    spoil(tmp_path, "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: damaged"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_one_of_another_version(llama, tmp_path):
    read_tokenizer(llama).save(tmp_path / "tokenizer.json")
    spoil(tmp_path, "tokenizer.json", lambda saved: saved.update(version=2))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: version 2, but this nanomai reads 1; update nanomai"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_without_the_library(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(HubError, match="needs a library: pip install tokenizers"):
        read_tokenizer(llama)


def test_texts_and_ids_that_it_cannot_take(both):
    _, _, ours = both
    with pytest.raises(TokenizerError, match="the text cannot be tokenized: "):
        ours.encode("a\ud800")
    with pytest.raises(TokenizerError, match=f"token id {ours.vocab_size} is not in this vocabulary"):
        ours.decode([ours.vocab_size])


def test_the_class_that_transformers_5_rebuilds(tmp_path):
    """Its LlamaTokenizer takes the vocabulary only, and adds no blank to a text that begins with one: tokenizer.json,
    and SentencePiece before it, add one to every text."""
    folder = write(tmp_path / "one", llama_2)
    spoil(folder, "tokenizer_config.json", lambda settings: settings.update(tokenizer_class="LlamaTokenizer"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, ours = hf.AutoTokenizer.from_pretrained(folder), read_tokenizer(folder)
    for text in NASTY:
        if not text.startswith((" ", "▁")) and "</s>" not in text:
            assert theirs(text, split_special_tokens=True)["input_ids"] == [1, *ours.encode(text)]
