"""GPT-2, Llama, Mistral and Phi-3 by configuration alone: the same logits and gradients as `transformers`.

Random weights of tiny models, copied name by name; the mappings below are the only thing that knows a family.
"""

import pytest
import torch
import transformers as hf

from nanomai.config import ModelConfig
from nanomai.model import Transformer

SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40,
         "max_position_embeddings": 32}
OURS = {"n_layers": 2, "d_model": 24, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 40, "vocab_size": 61,
        "context_length": 32, "tied_embeddings": False}
GPT2 = {"norm": "layernorm", "activation": "gelu", "position": "learned", "biases": ("qkv", "out", "mlp"),
        "tied_embeddings": True, "n_kv_heads": 4}


def llama(**changes):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, **changes))


def phi3(window):
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, num_key_value_heads=2, sliding_window=window, pad_token_id=0))


FAMILIES = {
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=4,
                                                      n_inner=40)), GPT2),
    "llama-2": (lambda: llama(rms_norm_eps=1e-6), {"norm_eps": 1e-6}),
    "llama-3": (lambda: llama(rope_theta=5e5, rms_norm_eps=1e-5), {"rope_theta": 5e5}),
    "llama-tied": (lambda: llama(tie_word_embeddings=True, rms_norm_eps=1e-5), {"tied_embeddings": True}),
    "llama-biases": (lambda: llama(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
                     {"biases": ("qkv", "out", "mlp")}),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(
        **SIZES, num_key_value_heads=1, head_dim=8, sliding_window=5, rms_norm_eps=1e-5)),
        {"n_kv_heads": 1, "head_dim": 8, "sliding_window": 5}),
    "phi-3": (lambda: phi3(7), {"sliding_window": 7}),
    "phi-3-wide": (lambda: phi3(None), {}),
}


def their_name(name: str, family: str) -> tuple[str, slice | None, bool]:
    """Where one of our parameters lives there: its name, the rows of a fused matrix, and whether it is transposed."""
    top = {"embed.weight": "wte.weight", "positions.weight": "wpe.weight"}
    if family == "gpt2":
        name = top.get(name, name).replace("blocks", "h")
        for ours, theirs in {"attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.wo": "attn.c_proj",
                             "mlp.w_up": "mlp.c_fc", "mlp.w_down": "mlp.c_proj"}.items():
            name = name.replace(ours, theirs)
        name, rows = fused(name, {"attention.w" + x: ("attn.c_attn", 24 * i, 24) for i, x in enumerate("qkv")})
        name = "ln_f" + name.removeprefix("norm") if name.startswith("norm.") else name
        return f"transformer.{name}", rows, ".c_" in name and name.endswith("weight")
    if name == "head.weight":
        return "lm_head.weight", None, False
    name = name.replace("blocks", "layers").replace("embed.", "embed_tokens.")
    name = name.replace(".attention_norm", ".input_layernorm").replace("mlp_norm", "post_attention_layernorm")
    rows = None
    if family.startswith("phi-3"):
        qkv, up = "self_attn.qkv_proj", "mlp.gate_up_proj"
        name, rows = fused(name, {"attention.wq": (qkv, 0, 24), "attention.wk": (qkv, 24, 12), "mlp.w_up": (up, 40, 40),
                                  "attention.wv": (qkv, 36, 12), "mlp.w_gate": (up, 0, 40)})
    for ours in ("attention.wq", "attention.wk", "attention.wv", "attention.wo"):
        name = name.replace(ours, f"self_attn.{ours[-1]}_proj")
    for ours in ("gate", "up", "down"):
        name = name.replace(f"mlp.w_{ours}", f"mlp.{ours}_proj")
    return f"model.{name}", rows, False


def fused(name: str, table: dict[str, tuple[str, int, int]]) -> tuple[str, slice | None]:
    for ours, (theirs, first, n) in table.items():
        if ours in name:
            return name.replace(ours, theirs), slice(first, first + n)
    return name, None


def piece(theirs: torch.Tensor, rows: slice | None, transposed: bool) -> torch.Tensor:
    theirs = theirs.T if transposed else theirs
    return theirs if rows is None else theirs[rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_gradients(family):
    build, changes = FAMILIES[family]
    torch.manual_seed(0)
    reference = build().eval()
    reference.set_attn_implementation("eager")
    theirs = dict(reference.named_parameters())
    with torch.no_grad():
        for p in theirs.values():  # their own beginning has biases of 0 and norms of 1, which hide mistakes
            p.add_(torch.randn_like(p), alpha=0.2)
    model = Transformer(ModelConfig(**OURS | changes))
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in named.items():
            where, rows, transposed = their_name(name, family)
            p.copy_(piece(theirs[where], rows, transposed))
    assert sum(p.numel() for p in named.values()) == sum(p.numel() for p in theirs.values())

    ids = torch.randint(61, (2, 19))
    mine, expected = model(ids), reference(ids).logits
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(mine)
    (mine * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for name, p in named.items():
        where, rows, transposed = their_name(name, family)
        wanted = piece(theirs[where].grad, rows, transposed)
        assert (p.grad - wanted).norm() <= 1e-5 * (wanted.norm() + 1), name  # a key's bias: 0, but for rounding


@pytest.mark.parametrize("family, mistake", [
    ("mistral", {"sliding_window": 6}), ("mistral", {"sliding_window": None}), ("phi-3", {"sliding_window": 8}),
    ("llama-3", {"rope_theta": 1e4}), ("llama-2", {"norm_eps": 1e-2}), ("gpt2", {"activation": "relu2"})], ids=str)
def test_a_wrong_setting_is_seen(family, mistake, monkeypatch):
    build, changes = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (build, changes | mistake))
    with pytest.raises(AssertionError, match="not close"):
        test_the_same_logits_and_gradients(family)
