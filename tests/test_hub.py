"""Folders of `transformers`, read and written; wrong and hostile ones each refused in one line, with nothing left."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_model_parity import CASES, SIZES, random_ids, reference
from tiny_run import environment, tiny, write_tiny

import nanomai
from nanomai import cli
from nanomai.config import ModelConfig
from nanomai.config_file import load_config
from nanomai.hub import HubError, folders, from_hf, import_run, read_model, to_hf
from nanomai.hub.families import FAMILIES, REQUIRED
from nanomai.hub.settings import config_of, settings_of
from nanomai.hub.vocabulary import GPT2_PATTERN, merges_of, read_tokenizer, write_tokenizer
from nanomai.model import build_model
from nanomai.pretrained import PretrainedTokenizer
from nanomai.sampling import generate
from nanomai.tokenizer import PATTERN, Tokenizer, get_tokenizer, train_bpe

HARD = ["", " ", "\n", "\r\n \t x", "a\u0300b", "e\u0301 \u00a0 x", "  def f(x):\n\t return  x\n\n\n", "日本語テスト。",
        "👩\u200d👩\u200d👧\u200d👦 x", "\u2028 x\u2029", "\x00\x01", "ﬁ ½ Ⅷ ²", "'s 'S don't WE'LL", "\u200b\u200d",
        "x" * 50 + " " * 50, "\U0001f1f5\U0001f1f1", "<|endoftext|", "١٢٣", "\ufeff", "\u0085x", "\x1c\x1d y",
        "𝒳𝓎 \U000e0001", "żółć हिन्दी عربى"]


def small_tokenizer(size=300, pattern=PATTERN):
    return train_bpe([Path(cli.__file__).read_text(), *HARD], size, pattern)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as transformers writes it, with a tokenizer of ours."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    torch.manual_seed(0)
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"vocab_size": 257, "tie_word_embeddings": True}))
    theirs.bfloat16().float().save_pretrained(folder)
    write_tokenizer(get_tokenizer("bytes"), folder, 32)
    return folder


@pytest.fixture
def copied(llama, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_import_and_export_give_identical_tensors(case, tmp_path):
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "theirs")
    model = read_model(tmp_path / "theirs")
    to_hf(model, tmp_path / "ours", architecture=type(theirs).__name__)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = read_model(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    if case != "phi-3.5-moe-long":  # where transformers leaves the long factors out
        ids = random_ids(2, 19)
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        loaded.set_experts_implementation("eager")
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_shards(copied, tmp_path, monkeypatch):
    model = read_model(copied)
    monkeypatch.setattr(folders, "SHARD_BYTES", 30_000)
    to_hf(model, tmp_path / "shards")
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "shards" / name).stat().st_size < 32_000 for name in files)
    again = read_model(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(loaded.lm_head.weight, model.embed.weight)


def test_bfloat16_stays_bfloat16(copied, tmp_path):
    model = read_model(copied)  # its numbers are such as bfloat16 holds
    to_hf(model, tmp_path / "half", dtype=torch.bfloat16)
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    again = read_model(tmp_path / "half")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_trained_run_writes_the_same_in_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    run = nanomai.train(tiny(train__steps=60)).run_dir
    assert cli.main(["export", str(run), "out"]) == 0
    assert "out: LlamaForCausalLM" in capsys.readouterr().out
    loaded, tokenizer = hf.AutoModelForCausalLM.from_pretrained("out"), hf.AutoTokenizer.from_pretrained("out")
    model, ours, _ = nanomai.load_run(run)
    prompt = tokenizer("the cat")["input_ids"]
    assert prompt == ours.encode("the cat")
    written = loaded.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert written == prompt + generate(model, prompt, 20, stop_tokens=[])
    assert len({*written}) > 5  # it writes words, not one letter
    assert cli.main(["import", "out", "again"]) == 0
    back, tokenizer, config = nanomai.load_run("again")
    assert tokenizer.hash == ours.hash and config.model.n_layers == 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    assert cli.main(["sample", "again", "--max-tokens", "5"]) == 0
    assert nanomai.from_hf("out")[1].hash == ours.hash
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


PEAKS = """
import threading, time
from nanomai.hub import import_run, read_model
def used():  # bytes of this process that are no file's
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
def peak(call):
    peaks, before, done = [], used(), threading.Event()
    def watch():
        while not done.wait(0.001):
            peaks.append(used())
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    done.set()
    watcher.join()
    return max(peaks) - before
import_run("small", "warm")  # what libraries load on their first call is not what is measured
print(peak(lambda: import_run("in", "out")), peak(lambda: read_model("in")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_import_needs_memory_for_a_few_tensors(copied, tmp_path):
    """60 MB of weights in matrices of 2 MB: a model that is read takes that much, an import a third of it at most."""
    (tmp_path / "llama").rename(tmp_path / "small")
    config = ModelConfig(n_layers=6, d_model=512, n_heads=4, n_kv_heads=4, head_dim=128, d_ff=1024, vocab_size=257)
    to_hf(build_model(config), tmp_path / "in", get_tokenizer("bytes"))
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=tmp_path, env=environment(), capture_output=True,
                          text=True, check=True)
    imported, read = map(int, done.stdout.split())
    assert imported < 20e6 and read > 60e6, (imported, read)


# --- Tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [get_tokenizer("bytes"), small_tokenizer(), small_tokenizer(400, GPT2_PATTERN)],
                         ids=["bytes", "ours", "gpt2"])
def test_the_same_ids(tokenizer, tmp_path):
    write_tokenizer(tokenizer, tmp_path, 64)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    letters = "".join("a" + chr(c) + " 1" + chr(c) * 2 for c in range(0, 0x110000, 37) if not 0xD800 <= c < 0xE000)
    for text in [*HARD, letters]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text), repr(text[:40])
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs("a<|endoftext|>b")["input_ids"] == tokenizer.encode("a<|endoftext|>b", allow_special=True)
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.end_of_text, tokenizer.vocab_size)
    assert read_tokenizer(tmp_path).hash == tokenizer.hash


def test_the_form_of_the_first_published_files(tmp_path):
    """As GPT-2's: a model without its kind, words cut by the bytes' own step, and its ends in config.json."""
    tokenizer = small_tokenizer(400, GPT2_PATTERN)
    write_tokenizer(tokenizer, tmp_path, 64)
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spoil(tmp_path, "tokenizer.json", lambda saved: saved.update(pre_tokenizer=step, post_processor=step))
    spoil(tmp_path, "tokenizer.json", lambda saved: saved["model"].pop("type"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.end_of_text}))
    assert read_tokenizer(tmp_path).hash == tokenizer.hash


def test_a_merge_is_what_the_ranks_below_leave():
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"bc", b"abc", b"xyz"]
    assert merges_of(tokens)[256:] == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), None]


def test_a_token_that_no_merge_makes(tmp_path):
    """It is found as a whole word only, on both sides."""
    tokenizer = Tokenizer(PATTERN, [bytes([b]) for b in range(256)] + [b"xyz"], {"<|endoftext|>": 257})
    write_tokenizer(tokenizer, tmp_path, 64)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("xyz", "xyzx", "axyz", "xyz xyz.xyz"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert read_tokenizer(tmp_path).hash == tokenizer.hash


def spoil(folder, name, change):
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rename(saved):
    saved["model"]["vocab"]["日"] = saved["model"]["vocab"].pop("Ā")  # the byte 0


def cutter(saved):
    return saved["pre_tokenizer"]["pretokenizers"][0]


OTHERS = {
    "byte fallback": lambda saved: saved["model"].update(byte_fallback=True),
    "normalizer": lambda saved: saved.update(normalizer={"type": "NFC"}),
    "cutter": lambda saved: saved.update(pre_tokenizer={"type": "Whitespace"}),
    "behaviour": lambda saved: cutter(saved).update(behavior="Removed"),
    "template": lambda saved: saved.update(post_processor={"type": "Sequence", "processors": []}),
    "a far id": lambda saved: saved["model"]["vocab"].update(ab=999),
    "a far special id": lambda saved: saved["added_tokens"][0].update(id=10**9),
    "other characters": rename,
    "merges in another order": lambda saved: saved["model"]["merges"].reverse(),
    "a merge less": lambda saved: saved["model"]["merges"].pop(),
    "a token of plain text": lambda saved: saved["added_tokens"].append(
        saved["added_tokens"][0] | {"id": 300, "content": "  ", "special": False}),
    "blanks beside a token": lambda saved: saved["added_tokens"][0].update(rstrip=True),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_that_ours_would_read_otherwise_is_run_by_its_library(other, tmp_path):
    ours = small_tokenizer()
    write_tokenizer(ours, tmp_path, 64)
    spoil(tmp_path, "tokenizer.json", OTHERS[other])
    found, theirs = read_tokenizer(tmp_path), hf.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(found, PretrainedTokenizer)
    for text in [*HARD, Path(cli.__file__).read_text(), "a <|endoftext|> b"]:
        assert found.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert found.encode(text, allow_special=True) == theirs(text)["input_ids"]


@pytest.mark.parametrize("message, change", [
    ("the tokenizers library cannot read it", lambda saved: saved.pop("model")),
    ("the tokenizers library cannot read it", lambda saved: cutter(saved)["pattern"].update(Regex="(")),
])
def test_a_file_that_no_library_reads(message, change, tmp_path):
    write_tokenizer(small_tokenizer(), tmp_path, 64)
    spoil(tmp_path, "tokenizer.json", change)
    with pytest.raises(HubError, match=r"tokenizer\.json: ") as caught:
        read_tokenizer(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- Faults -----------------------------------------------------------------------------------------------------------


def tensors_changed(change):
    def plant(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return plant


def settings_changed(**values):
    return lambda folder: spoil(folder, "config.json", lambda settings: settings.update(values))


def indexed(weight_map):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def header(text, length=None):
    """A file that is only a header of this text, which says that it is so long."""
    def plant(folder):
        data = text.encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data) if length is None else length) + data)
    return plant


def put(name, value):
    return tensors_changed(lambda tensors: tensors.update({name: value(tensors[name]).contiguous()}))


def drop(name):
    return lambda folder: (folder / name).unlink()


def in_two_files(weight_map):
    """A norm of ones in the second file too, and an index."""
    def plant(folder):
        save_file({NORM: torch.ones(24)}, folder / "second.safetensors")
        indexed(weight_map | {"x": "model.safetensors", "y": "second.safetensors"})(folder)
    return plant


def another_head(folder):
    settings_changed(tie_word_embeddings=False)(folder)
    put("model.embed_tokens.weight", torch.Tensor.clone)(folder)
    tensors_changed(lambda tensors: tensors.update(weight=tensors["model.embed_tokens.weight"].clone()))(folder)


def replaced(make):
    """Something else than a file in the place of config.json."""
    def plant(folder):
        (folder / "config.json").unlink()
        make(folder / "config.json")
    return plant


def scaled(kind, **more):
    return settings_changed(rope_parameters={"rope_type": kind, "rope_theta": 1e4} | more)


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
LONG = "x" * 100_000
HUGE = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}})
FAULTS = {
    "missing": (tensors_changed(lambda t: t.pop(UP)), f"tensor '{UP}' is missing"),
    "many missing": (settings_changed(num_hidden_layers=4), "(and 8 more) is missing"),
    "extra": (tensors_changed(lambda t: t.update(odd=torch.zeros(1))), "tensor 'odd' has no place"),
    "a layer too many": (settings_changed(num_hidden_layers=2), "(and 8 more) has no place"),
    "transposed": (put(UP, torch.t), "(24, 40), and config.json means (40, 24); it seems to be transposed"),
    "wrong shape": (put(NORM, lambda t: t[:-1]), "has shape (23,), and config.json means (24,)"),
    "whole numbers": (put(NORM, lambda t: t.int()), "is I32; nanomai reads BF16, F16, F32, F64"),
    "not finite": (put(NORM, lambda t: t / 0), f"tensor '{NORM}' holds numbers that are not finite"),
    "unknown class": (settings_changed(architectures=["LlamaForCausalML"]), "did you mean 'LlamaForCausalLM'?"),
    "no class": (settings_changed(architectures=None), "architecture None is not known; there are Llama"),
    "other activation": (settings_changed(hidden_act="relu"), "hidden_act is 'relu', and nanomai has 'silu' only"),
    "quantised": (settings_changed(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    "another rotation": (settings_changed(rope_parameters={"rope_type": "dynamic"}),
                         "rope_type 'dynamic' is not one of default"),
    "no factor": (settings_changed(rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn' needs factor"),
    "a ramp from nowhere": (settings_changed(rope_parameters={"rope_type": "yarn", "factor": 4, "beta_slow": 0}),
                            "low_frequency 0.0 must be from 1e-06"),
    "no size": (settings_changed(hidden_size=None), "config.json: hidden_size is missing"),
    "words": (settings_changed(num_hidden_layers="two"), "json: num_hidden_layers is 'two', and must be a number"),
    "negative": (settings_changed(intermediate_size=-8), "model.d_ff: d_ff -8 must be above 0"),
    "a word for a switch": (settings_changed(attention_bias="no"), "attention_bias is 'no', and must be true or false"),
    "a word for a number": (settings_changed(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5', and must be a number"),
    "a switch for a number": (settings_changed(num_key_value_heads=True), "num_key_value_heads is True, and must be a"),
    "a word for a base": (settings_changed(rope_parameters={"rope_theta": "1e4"}), "rope_theta is '1e4', and must be"),
    "no slow waves": (scaled("llama3", factor=8.0), "rope_type 'llama3' needs low_freq_factor"),
    "no long factors": (scaled("longrope", short_factor=[1.0] * 3), "rope_type 'longrope' needs long_factor"),
    "words for factors": (scaled("longrope", short_factor=["1"]), "short_factor is ['1'], and must be a list of numb"),
    "a long class": (settings_changed(architectures=[LONG]), "architecture 'xxxxx"),
    "a long value": (settings_changed(hidden_act=LONG), "hidden_act is 'xxxxx"),
    "a long kind": (scaled(LONG), "rope_type 'xxxxx"),
    "a long number": (settings_changed(intermediate_size=-10**4000), "config.json: model.d_ff: -10000"),
    "a long tensor": (tensors_changed(lambda t: t.update({LONG: torch.zeros(1)})), "tensor 'xxxxx"),
    "a long file": (indexed({UP: LONG}), "index.json: 'xxxxx"),
    "a pipe": (replaced(os.mkfifo), "config.json is not a file of at most 268,435,456 bytes"),
    "a device": (replaced(lambda path: path.symlink_to("/dev/zero")), "config.json is not a file of at most"),
    "a large file": (lambda folder: os.truncate(folder / "config.json", 2**29), "config.json is not a file of at most"),
    "in two files": (in_two_files({}), f"tensor '{NORM}' is in two files, and model.safetensors.index.json names"),
    "in another file": (in_two_files({NORM: "model.safetensors", UP: "second.safetensors"}),
                        f"tensor '{UP}' is missing"),
    "another head": (another_head, "tensor 'lm_head.weight' is missing"),
    "a list for a name": (settings_changed(architectures=[["x"]]), "config.json holds a value of the wrong kind"),
    "a mapping for a name": (settings_changed(rope_parameters={"rope_type": {}}), "rope_type {} is not one of"),
    "more tokens than rows": (lambda folder: write_tokenizer(small_tokenizer(), folder, 32),
                              "tokenizer.json has 300 tokens, and the model knows 257"),
    "a far id": (lambda folder: spoil(folder, "tokenizer.json", lambda saved: saved["added_tokens"][0].update(
        id=2**62)), "tokenizer.json: the tokenizers library cannot read it: invalid value"),
    "half a head": (settings_changed(num_attention_heads=0), "must be whole numbers above 0"),
    "a million layers": (settings_changed(num_hidden_layers=10**9), "names 1000000000 layers or experts"),
    "wide": (settings_changed(hidden_size=10**9), "and config.json means (257, 1000000000)"),
    "too wide": (settings_changed(intermediate_size=2**62), "means matrices that are too large"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not a JSON object"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "config.json is not a JSON object"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "no settings": (drop("config.json"), "llama has no config.json; name the folder of a Hugging Face model: config"),
    "no folder": (shutil.rmtree, "llama is no folder; name the folder of a Hugging Face model: config.json, safeten"),
    "no weights": (drop("model.safetensors"), "model.safetensors is missing"),
    "no tokenizer": (drop("tokenizer.json"), "tokenizer.json: No such file or directory"),
    "pickle": (only_pickle, "holds .bin files, which are pickle"),
    "above": (indexed({UP: "../llama/model.safetensors"}), "'../llama/model.safetensors' is not the name of a"),
    "absolute": (indexed({UP: "/etc/passwd"}), "'/etc/passwd' is not the name of a safetensors file in this folder"),
    "not a name": (indexed({UP: ["x"]}), "weight_map must map names to files"),
    "an empty index": (indexed({}), "names 3 layers or experts, and there are 0 tensors"),
    "no shard": (indexed({UP: "model-00001-of-00002.safetensors"}), "model-00001-of-00002.safetensors is missing"),
    "absurd shape": (header(HUGE), "model.safetensors is not a safetensors file"),
    "absurd header": (header("{}", 2**60), "model.safetensors is not a safetensors file"),
    "no header": (header("", 0), "model.safetensors is not a safetensors file"),
    "cut short": (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "is not a safetensors file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_leaves_nothing(fault, copied, tmp_path, capsys):
    plant, message = FAULTS[fault]
    plant(copied)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["import", str(copied), str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and len(said) < 400, said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def quantised(tmp_path):
    """A folder as DeepSeek-V3's is: matrices of the layers in fp8, and the numbers that they stand for."""
    torch.manual_seed(0)
    settings = CASES["deepseek-v3-yarn"][1] | {"vocab_size": 257, "hidden_size": 144, "kv_lora_rank": 270}
    hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**settings)).save_pretrained(tmp_path / "in")
    write_tokenizer(get_tokenizer("bytes"), tmp_path / "in", 32)
    stored, meant = {}, load_file(tmp_path / "in" / "model.safetensors")
    for name, weight in list(meant.items()):
        stored[name] = weight
        if "_proj" in name:
            rows, columns = (torch.arange(n) // 128 for n in weight.shape)  # of which block
            scales = torch.tensor([[weight[rows == r][:, columns == c].abs().max() / 448 for c in columns.unique()]
                                   for r in rows.unique()])
            each = scales[rows[:, None], columns]
            stored[name] = (weight / each).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            meant[name] = stored[name].float() * each
    save_file(stored, tmp_path / "in" / "model.safetensors")
    spoil(tmp_path / "in", "config.json", lambda settings: settings.update(quantization_config={
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}))
    return tmp_path / "in", meant


def test_fp8_is_read_as_the_numbers_that_it_stands_for(quantised, tmp_path):
    folder, meant = quantised
    scales = load_file(folder / "model.safetensors")["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
    assert scales.shape == (3, 2), "278 x 144 numbers: the last blocks are cut"
    assert cli.main(["import", str(folder), str(tmp_path / "run")]) == 0
    model, _, _ = nanomai.load_run(tmp_path / "run")
    to_hf(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == meant.keys() and all(torch.equal(written[name], meant[name]) for name in meant)


DOWN = "model.layers.0.mlp.down_proj.weight"
QUANTISED = {
    "no scales": (tensors_changed(lambda t: t.pop(f"{DOWN}_scale_inv")), f"tensor '{DOWN}_scale_inv' is missing"),
    "other blocks": (put(f"{DOWN}_scale_inv", lambda t: t.repeat(2, 1)),
                     "has shape (4, 1), and config.json means (2, 1)"),
    "scales of nothing": (put(DOWN, torch.Tensor.float), f"tensor '{DOWN}_scale_inv' has no place"),
    "another fp8": (put(DOWN, lambda t: t.to(torch.float8_e5m2)), f"tensor '{DOWN}_scale_inv' has no place"),
    "whole numbers": (put(f"{DOWN}_scale_inv", torch.Tensor.int), "is I32; nanomai reads BF16, F16, F32, F64"),
    "not finite": (put(f"{DOWN}_scale_inv", lambda t: t / 0), f"tensor '{DOWN}' holds numbers that are not finite"),
    "not said": (settings_changed(quantization_config=None), "has no place in this architecture"),
    "another size": (settings_changed(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
                     "quantization_config is {'quant_method': 'fp8', 'weight_block_size': [64, 64]}, and nanomai has"),
}


@pytest.mark.parametrize("fault", QUANTISED)
def test_a_fault_of_fp8_is_one_line(fault, quantised):
    plant, message = QUANTISED[fault]
    plant(quantised[0])
    with pytest.raises(HubError) as caught:
        read_model(quantised[0])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_stands_there_stays(copied, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(HubError, match="out exists already; choose another folder"):
        to_hf(read_model(copied), tmp_path / "out")
    with pytest.raises(HubError, match="exists already"):
        import_run(copied, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_index_says_which_of_two(copied):
    before = read_model(copied).state_dict()["blocks.0.attention_norm.weight"]
    save_file({NORM: before.repeat(2)[:24] + 1}, copied / "second.safetensors")
    for name, added in (("model.safetensors", 0), ("second.safetensors", 1)):
        indexed({NORM: name, "x": "model.safetensors", "y": "second.safetensors"})(copied)
        assert torch.equal(read_model(copied).state_dict()["blocks.0.attention_norm.weight"], before + added)


@contextlib.contextmanager
def small_files(most):
    """The system refuses what reaches beyond so many bytes of a file, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(copied, tmp_path):
    model = read_model(copied)
    with small_files(20_000):  # fewer than the embedding has
        with pytest.raises(HubError, match="out cannot be written: File too large") as exported:
            to_hf(model, tmp_path / "out")
        with pytest.raises(HubError, match="run cannot be written: File too large") as imported:
            import_run(copied, tmp_path / "run")
    assert "\n" not in f"{exported.value}{imported.value}"
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_a_disk_that_the_checkpoint_fills(copied, tmp_path):
    with small_files(60_000), pytest.raises(HubError, match=r"run cannot be written: File too large$"):
        import_run(copied, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_where_a_run_may_appear(copied, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["import", "../llama", "."]) == 1
    assert capsys.readouterr().err == "nanomai: . exists already; choose another folder\n"
    assert cli.main(["import", "../llama", "../llama/run"]) == 1
    assert "../llama/run lies in ../llama, which is read" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    run = import_run("~/llama", "~/run")
    assert run == tmp_path / "run" and nanomai.load_run(run).config.data.tokenizer == str(run / "tokenizer.json")
    assert to_hf(read_model("~/llama"), "~/out") == tmp_path / "out"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "llama", "out", "run"]


def test_an_imported_run_is_measured_on_a_text(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import_run("llama", "run")
    assert cli.main(["eval", "run"]) == 1
    said = capsys.readouterr()
    assert said.err == "nanomai: run was imported, so it has no validation split; measure on --text FILE\n"
    assert said.out == "" and not Path("data").exists()
    Path("text").write_text("the cat sat on the mat\n" * 40)
    assert cli.main(["eval", "run", "--text", "text"]) == 0


def test_phimoe_is_another_model_in_transformers_beyond_its_first_context(tmp_path, monkeypatch, capsys):
    """reference("phi-3.5-moe-long") has rotations of its own; theirs keep to the short factors."""
    monkeypatch.chdir(tmp_path)
    for case, cautioned in (("phi-3.5-moe-long", True), ("phi-3.5-moe", False), ("phi-3-long", False)):
        reference(case).save_pretrained(case)
        model = read_model(case)
        monkeypatch.setattr("nanomai.runs.load_run", lambda run, model=model: (model, None, None))
        assert cli.main(["export", "run", f"out-{case}"]) == 0
        assert ("nanomai: PhimoeForCausalLM of transformers keeps to the short factors of LongRoPE: beyond 12 tokens "
                "it computes something else" in capsys.readouterr().err) == cautioned


@pytest.mark.parametrize("command, names", [("import", "DIR OUT"), ("export", "RUN OUT"), ("sample", "RUN")])
def test_help_names_what_is_given(command, names, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert f" {names}" in said.splitlines()[0] and "STR STR" not in said


def test_a_tokenizer_of_another_model(copied, tmp_path):
    model, tokenizer = from_hf(copied)
    assert tokenizer.hash == get_tokenizer("bytes").hash
    with pytest.raises(HubError, match="the tokenizer has 300 tokens and the model 257"):
        to_hf(model, tmp_path / "out", small_tokenizer())


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, architecture", [
    ("nano", "LlamaForCausalLM"), ("gpt2-124m", "GPT2LMHeadModel"), ("llama-3-8b", "LlamaForCausalLM")])
def test_configurations_and_their_classes(name, architecture):
    assert settings_of(load_config(name).model)["architectures"] == [architecture]


def test_settings_as_transformers_4_wrote_them():
    """The config.json of Phi-3.5-MoE in its first form: scaling apart from theta, factors with the old key."""
    old = {"architectures": ["PhimoeForCausalLM"], "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 8, "num_local_experts": 4,
           "max_position_embeddings": 64, "original_max_position_embeddings": 8, "rope_theta": 10000.0,
           "attention_bias": True, "lm_head_bias": True, "torch_dtype": "bfloat16", "rope_scaling": {
               "type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "short_mscale": 1.243,
               "long_mscale": 1.243}}
    _, config = config_of(old)
    scaling = config.rope_scaling
    assert (config.rope_theta, scaling.kind, scaling.original_context) == (1e4, "longrope", 8)
    assert (scaling.long_factors, scaling.attention_factor) == ((2.0, 3.0), 1.243)
    assert config.biases == ("qkv", "out", "head") and config.moe.jitter == 0.01
    old["rope_scaling"]["long_mscale"] = 1.3
    with pytest.raises(HubError, match=r"short_mscale 1.243 and long_mscale 1.3 must be alike"):
        config_of(old)


def test_yarn_as_deepseek_v3_writes_it():
    """In config.json's first form; what is left out means what it means in transformers, and nothing is lost."""
    theirs = reference("deepseek-v3").config.to_dict()
    given = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
             "original_max_position_embeddings": 4096}
    old = {key: value for key, value in theirs.items() if key != "rope_parameters"} | {
        "architectures": ["DeepseekV3ForCausalLM"], "max_position_embeddings": 163840, "rope_theta": 10000}
    _, config = config_of(old | {"rope_scaling": given})
    scaling = config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("yarn", 40, 4096)
    assert (scaling.low_frequency, scaling.high_frequency, scaling.mscale, scaling.mscale_all_dim) == (1, 32, 1, 1)
    written = settings_of(config)
    assert written["architectures"] == ["DeepseekV3ForCausalLM"] and config_of(written)[1] == config
    del given["type"]
    assert written["rope_parameters"] == given | {"rope_type": "yarn", "rope_theta": 1e4, "truncate": True}
    assert (written["rope_scaling"], written["rope_theta"]) == (written["rope_parameters"], 1e4)
    few = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "beta_fast": None, "mscale": 1.0,
           "mscale_all_dim": 1.0}
    assert config_of(old | {"original_max_position_embeddings": 4096, "rope_parameters": few})[1] == config


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_leaves_out(name):
    """It means what the class of transformers means, where the shapes of tensors do not tell."""
    theirs = getattr(hf, name.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config"))().to_dict()
    theirs["architectures"] = [name]
    family = FAMILIES[name]
    told = {"intermediate_size", "moe_intermediate_size", "num_local_experts"}
    required = {key for key, ours in family.settings.items() if ours in REQUIRED or key in told}
    kept = required | {"architectures"}
    assert config_of({key: value for key, value in theirs.items() if key in kept}) == config_of(theirs)


def test_the_outer_original_context_is_theirs_by_default(tmp_path):
    """Phi-3's class has 4096 there, whatever stands among the rotations."""
    theirs = reference("phi-3-long")
    settings = theirs.config.to_dict() | {"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 8192}
    del settings["original_max_position_embeddings"]
    assert settings["rope_parameters"]["original_max_position_embeddings"] == 12
    assert config_of(settings)[1].rope_scaling.original_context == 4096
    assert hf.Phi3Config(**settings).rope_parameters["original_max_position_embeddings"] == 4096


def test_names_without_their_first_word(tmp_path):
    """As in GPT-2's own file, which also holds the triangle of its mask."""
    reference("gpt2").save_pretrained(tmp_path)
    whole = read_model(tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors")
    again = read_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.state_dict().items())
