"""Configuration files: what is read, how strictly, and the exact line that each mistake gets."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomai.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from nanomai.config_file import CONFIG_FOLDER, config_from_dict, find_config, load_config, replace, to_yaml

NEITHER = f"neither a .yaml file nor one of the {len(list(CONFIG_FOLDER.glob('*.yaml')))} in scale_configs/"


def load(folder, text: str | bytes, **overrides) -> Config:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, **overrides)


# Each text and the line it gets; FILE stands for the path.
ERRORS = {
    "unknown": ("model:\n  n_layer: 4", "FILE:2: unknown setting 'model.n_layer'; did you mean 'n_layers'?"),
    "unknown, nothing near": ("train:\n  wibble: 4", "FILE:2: unknown setting 'train.wibble'"),
    "unknown section": ("modle:\n  n_layers: 4", "FILE:1: unknown setting 'modle'; did you mean 'model'?"),
    "duplicate": ("model:\n  n_layers: 4\n  d_ff: 8\n  n_layers: 5",
                  "FILE:4: model.n_layers is given twice (first on line 2)"),
    "duplicate section": ("model: {n_layers: 4}\nmodel: {d_ff: 4}", "FILE:2: model is given twice (first on line 1)"),
    "duplicate knot": ("optim:\n  lr: {0: 1e-3, 5: 1e-4, 5: 1e-5}", "FILE:2: optim.lr gives the same key twice"),
    "text for a whole number": ("model:\n  n_layers: four", "FILE:2: model.n_layers: 'four' is not a whole number"),
    "a fraction for a whole number": ("model:\n\n  d_ff: 1.5", "FILE:3: model.d_ff: 1.5 is not a whole number"),
    "a boolean for a whole number": ("model:\n  d_ff: yes", "FILE:2: model.d_ff: True is not a whole number"),
    "a list for a number": ("optim:\n  lr: [1]",
                            "FILE:2: optim.lr: [1] is not a number or a mapping of a whole number to a number"),
    "a number for a text": ("data:\n  corpus: 5", "FILE:2: data.corpus: 5 is not text"),
    "a date for a text": ("data:\n  corpus: 2024-05-06",
                          "FILE:2: data.corpus: datetime.date(2024, 5, 6) is not text"),
    "a day that is none": ("data:\n  corpus: 2024-13-06", "FILE:2: data.corpus: month must be in 1..12"),
    "a number for a boolean": ("model:\n  tied_embeddings: 1",
                               "FILE:2: model.tied_embeddings: 1 is not true or false"),
    "null for a number": ("model:\n  d_ff:", "FILE:2: model.d_ff: None is not a whole number"),
    "a word that is no choice": ("model:\n  norm: batchnorm",
                                 "FILE:2: model.norm: 'batchnorm' is not one of rmsnorm, layernorm"),
    "on, where it is no choice": ("model:\n  norm: on", "FILE:2: model.norm: True is not one of rmsnorm, layernorm"),
    "not a list": ("model:\n  biases: qkv", "FILE:2: model.biases: 'qkv' is not a list of one of qkv, out, mlp, head"),
    "a wrong item": ("model:\n  biases: [qkv, q]", "FILE:2: model.biases: 'q' is not one of qkv, out, mlp, head"),
    "not a number": ("optim:\n  eps: .nan", "FILE:2: optim.eps: nan is not a finite number"),
    "infinite": ("optim:\n  eps: .inf", "FILE:2: optim.eps: inf is not a finite number"),
    "infinite as text": ("optim:\n  eps: 1e999", "FILE:2: optim.eps: '1e999' is not a finite number"),
    "heads": ("model:\n  n_heads: 4\n  n_kv_heads: 3",
              "FILE:3: model.n_kv_heads: n_kv_heads 3 must divide n_heads 4: each serves as many query heads"),
    "batch": ("train:\n  batch_tokens: 1000", "FILE:2: train.batch_tokens: batch_tokens 1000 is not a multiple of the "
                                              "sequence length 256; the nearest is 1024"),
    "knots": ("optim:\n  lr: {5: 1e-3}", "FILE:2: optim.lr: lr {5: 0.001} must give its steps in rising order from 0"),
    "a knot's value": ("optim:\n  lr: {0: fast}",
                       "FILE:2: optim.lr: {0: 'fast'} is not a number or a mapping of a whole number to a number"),
    "section is a list": ("model: [1]", "FILE:1: model must be a mapping of settings"),
    "section is empty": ("model:", "FILE:1: model must be a mapping of settings"),
    "file is a list": ("- 1", "FILE:1: the file must be a mapping of settings"),
    "a list for a name": ("? [a]\n: 1", "FILE:1: unknown setting"),
    "empty": ("", "FILE: the file is empty; see scale_configs/nano.yaml for a complete one"),
    "comments only": ("# nothing\n", "FILE: the file is empty; see scale_configs/nano.yaml for a complete one"),
    "not YAML": ("model: {n_layers: 4", "FILE:1: not YAML: expected ',' or '}', but got '<stream end>'"),
    "a tab": ("model:\n\tn_layers: 4", "FILE:2: not YAML: found character '\\t' that cannot start any token"),
    "not UTF-8": (b"model:\n  # \xff\xfe\n", "FILE: not YAML: not UTF-8 text"),
    "a Python object": ("data:\n  corpus: !!python/object/apply:os.system [exit]",
                        "FILE:2: data.corpus: could not determine a constructor for the tag "
                        "'tag:yaml.org,2002:python/object/apply:os.system'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_each_mistake_gets_its_line(tmp_path, name):
    text, message = ERRORS[name]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    said = str(caught.value).replace(str(tmp_path / "mine.yaml"), "FILE")
    assert said.startswith(message) if name == "a list for a name" else said == message
    assert "\n" not in said


OVERRIDE_ERRORS = [
    ({"train.stepz": 1}, "unknown setting 'train.stepz'; did you mean 'steps'?"),
    ({"trian.steps": 1}, "unknown setting 'trian.steps'; did you mean 'train'?"),
    ({"train.batch_tokens.0": 1}, "unknown setting 'train.batch_tokens.0'"),
    ({"model": 5}, "model must be a mapping of settings"),
    ({"train.steps": "many"}, "'many' is not a whole number"),
    ({"model.d_ff": 10**400}, f"{10**400} is not a finite number"),
]


@pytest.mark.parametrize("overrides, message", OVERRIDE_ERRORS, ids=[next(iter(o)) for o, _ in OVERRIDE_ERRORS])
def test_wrong_overrides(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("nano", **overrides)
    assert str(caught.value).endswith(message)
    with pytest.raises(ConfigError) as caught:
        replace(Config(), **overrides)
    assert str(caught.value) == message


def test_a_missing_file_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        load_config("nanno")
    assert str(caught.value) == f"no configuration 'nanno': {NEITHER}; did you mean 'nano'?"
    with pytest.raises(ConfigError) as caught:
        load_config("zzz/qqq.yaml")
    assert str(caught.value) == f"no configuration 'zzz/qqq.yaml': {NEITHER}"


@pytest.mark.parametrize("name", ["nano.1", "nano.txt", "folder/nano"])
def test_a_name_with_more_to_it_is_another_name(name):
    """To pathlib phi-1.5 is phi-1 with a suffix; it must never be loaded for it."""
    with pytest.raises(ConfigError, match="no configuration"):
        find_config(name)


def test_a_name_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("nano") == find_config("nano.yaml") == CONFIG_FOLDER / "nano.yaml"
    (tmp_path / "nano.yaml").write_text("train: {steps: 7}")
    assert load_config("nano.yaml").train.steps == 7, "a file that is here comes first"
    assert load_config("nano").train.steps == load_config(CONFIG_FOLDER / "nano.yaml").train.steps


@pytest.mark.parametrize("written, field, value", [
    ("optim: {lr: 3e-4}", "optim.lr", 3e-4), ("optim: {lr: 1}", "optim.lr", 1.0),
    ("optim: {lr: {0: 1e-3, 10: 3e-4}}", "optim.lr", {0: 1e-3, 10: 3e-4}),
    ("train: {steps: 1e6}", "train.steps", 10**6), ("train: {steps: 1_000}", "train.steps", 1000),
    ("train: {batch_tokens: {0: 256, 1e3: 512}}", "train.batch_tokens", {0: 256, 1000: 512}),
    ("train: {compile: on}", "train.compile", "on"), ("train: {compile: off}", "train.compile", "off"),
    ("train: {compile: false}", "train.compile", "off"), ("train: {resume: yes}", "train.resume", True),
    ("model: {sliding_window: null}", "model.sliding_window", None),
    ("model: {sliding_window: 9}", "model.sliding_window", 9),
    ("model: {biases: [qkv, mlp]}", "model.biases", ("qkv", "mlp")), ("data: {corpus: '5'}", "data.corpus", "5"),
])
def test_the_field_decides_the_type(tmp_path, written, field, value):
    section, name = field.split(".")
    found = getattr(getattr(load(tmp_path, written), section), name)
    assert found == value and type(found) is type(value)


def test_defaults_and_overrides(tmp_path):
    assert load(tmp_path, "{}") == Config(name="mine")
    assert load(tmp_path, "name: other").name == "other"
    config = load(tmp_path, "train: {steps: 5}", **{"train.steps": 6, "optim.lr": "3e-4", "name": "x"})
    assert (config.train.steps, config.optim.lr, config.name) == (6, 3e-4, "x")


def test_replace():
    config = load_config("nano")
    changed = replace(config, **{"train.steps": 10, "model.biases": ["qkv"], "optim.lr": {0: 1e-3}})
    assert (changed.train.steps, changed.model.biases, changed.optim.lr) == (10, ("qkv",), {0: 1e-3})
    back = {"train.steps": config.train.steps, "model.biases": (), "optim.lr": config.optim.lr}
    assert replace(changed, **back) == config
    with pytest.raises(ConfigError, match="not a multiple of the sequence length"):
        replace(config, **{"train.sequence_length": 300})


# --- any valid configuration comes back from its own YAML
whole, share = st.integers(1, 10**12), st.floats(0, 1, exclude_max=True)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
steps = st.lists(whole, unique=True, max_size=3).map(lambda found: [0, *sorted(found)])


def knots(values):
    return values | steps.flatmap(lambda s: st.tuples(*[values] * len(s)).map(lambda v: dict(zip(s, v, strict=True))))


@st.composite
def configs(draw) -> Config:
    kv, t = draw(st.integers(1, 9)), draw(st.integers(1, 10**6))
    model = ModelConfig(
        n_layers=draw(whole), d_model=draw(whole), n_kv_heads=kv, n_heads=kv * draw(st.integers(1, 9)),
        head_dim=2 * draw(whole), norm_eps=draw(st.floats(1e-12, 1)), rope_theta=draw(st.floats(1, 1e12)),
        context_length=t,
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])), tied_embeddings=draw(st.booleans()),
        activation=draw(st.sampled_from(["swiglu", "gelu", "relu2"])), sliding_window=draw(st.none() | whole),
        position=draw(st.sampled_from(["rope", "learned"])),
        biases=tuple(draw(st.lists(st.sampled_from(["qkv", "out", "mlp"]), unique=True))))
    data = DataConfig(corpus=draw(text), folder=draw(text), val_fraction=draw(st.floats(1e-6, 0.9)), seed=draw(whole))
    optim = OptimConfig(name=draw(st.sampled_from(["adamw", "muon"])), lr=draw(knots(positive)), eps=draw(positive),
                        beta1=draw(share), weight_decay=draw(positive))
    train = TrainConfig(batch_tokens=draw(knots(whole.map(lambda n: n * t))), run_dir=draw(st.none() | text),
                        compile=draw(st.sampled_from(["auto", "on", "off"])), resume=draw(st.booleans()),
                        sequence_length=draw(st.sampled_from([None, t])), sample_prompt=draw(text), steps=draw(whole))
    return Config(name=draw(text), model=model, data=data, optim=optim, train=train)


@settings(max_examples=100, deadline=None)
@given(configs())
def test_any_config_round_trips(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert config_from_dict(dataclasses.asdict(config)) == config
    assert replace(config) == config


def test_the_file_is_readable_by_a_person():
    text = to_yaml(load_config("mai-1-dense"))
    assert text.splitlines()[:3] == ["name: mai-1-dense", "model:", "  n_layers: 120"]
    assert "biases: []" in text


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_complete(path):
    """Whoever reads it sees the whole architecture and recipe; only what is off by default may be left out."""
    written, off = yaml.safe_load(path.read_text()), {
        "sliding_window", "biases", "moe", "mla", "sparse", "rope_scaling", "rotary_dim", "qk_norm", "parallel_block",
        "attention_scale", "embedding_scale", "logit_scale"}
    expected = {field.name for field in dataclasses.fields(ModelConfig)} - off
    if written["model"]["position"] == "learned":
        expected.remove("rope_theta")
    assert expected <= set(written["model"])
    assert {"corpus", "tokenizer", "val_fraction"} <= set(written["data"])
    recipe = {"name", "lr", "schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "grad_clip"}
    assert recipe <= set(written["optim"])
    assert {"steps", "batch_tokens", "eval_every", "checkpoint_every"} <= set(written["train"])
