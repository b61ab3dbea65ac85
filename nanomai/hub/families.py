"""The classes of `transformers` that a model can come from or go to: how each names its settings and its tensors.

These tables are the only place that knows both sides. `settings.py` reads and writes config.json by them; `links`
joins their tensors to ours, for weights as for gradients.
"""

from __future__ import annotations

import json
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanomai.architecture import ModelConfig

MOST_JSON = 2**28  # bytes: tokenizers and indices of the largest models have a tenth of it


class HubError(ValueError):
    """A folder, file or model that cannot be imported or exported: one line that names it and says what to do."""


def cut(text: str, most: int = 60) -> str:
    """What others wrote, short enough for a line of ours."""
    return text if len(text) <= most else text[: most - 3] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file, or HubError. A pipe, or a device without an end, is not read."""
    value = None
    try:
        there = path.stat()
        usual = stat.S_ISREG(there.st_mode) and there.st_size <= MOST_JSON
        value = json.loads(path.read_bytes()) if usual else None
    except OSError as error:
        raise HubError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        pass
    if not isinstance(value, dict):
        raise HubError(f"{path} is not {'a JSON object' if usual else f'a file of at most {MOST_JSON:,} bytes'}")
    return value


@dataclass(frozen=True)
class Family:
    """One class. Setting names with a dot are ours, inside `ModelConfig`."""

    model_type: str
    ours: dict[str, Any]
    """What the class always is."""
    modules: dict[str, str]
    """Our module: theirs. Several of ours with one of theirs are fused, row after row, in our model's order."""
    settings: dict[str, str]
    """Their setting: ours."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What a setting means that config.json leaves out."""
    demands: dict[str, tuple] = field(default_factory=dict)
    """Settings of theirs that must have one of these values here; the first one is written."""
    biases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Their switch: the biases that it turns on."""
    needs: tuple[str, ...] = ()
    """Ours that cannot be 0 there."""
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn", "longrope")
    whole_heads: bool = False
    """d_model must be divisible by n_heads, even where head_dim says how wide a head is."""
    layers: str = "model.layers"
    transposed: bool = False
    """Their projections are stored (in, out)."""
    paired: tuple[str, ...] = ()
    """Modules of ours whose turned rows are neighbours there and halves here."""
    unturned: str | None = None
    """Their setting for the numbers of a head that are not turned: beside mla.rope_dim, in place of head_dim."""
    predicts: bool = False
    """Files hold layers beyond the last, which predict further tokens."""
    partial: float | None = None
    """The share of a head that is turned, where config.json leaves it out; None: all of it, always."""
    mscale: bool = False
    """LongRoPE's attention factor is given twice, for short and for long texts."""
    short_only: bool = False
    """transformers turns by LongRoPE's short factors, however long the text is."""


_SIZES = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers",
          "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "intermediate_size": "d_ff",
          "max_position_embeddings": "context_length", "rms_norm_eps": "norm_eps", "initializer_range": "init_std",
          "tie_word_embeddings": "tied_embeddings"}
REQUIRED = ("vocab_size", "d_model", "n_layers", "n_heads", "context_length")
DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False, "rope_theta": 1e4}
_SILU = {"hidden_act": ("silu",)}
_GELU = ("gelu_new", "gelu_pytorch_tanh")

_ENDS = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_ATTENTION = {f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
_LLAMA = _ENDS | _NORMS | _ATTENTION | {f"mlp.w_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_MIXTRAL = _ENDS | _NORMS | _ATTENTION | {
    "mlp.router": "block_sparse_moe.gate", "mlp.experts.w_gate": "block_sparse_moe.experts.{e}.w1.weight",
    "mlp.experts.w_up": "block_sparse_moe.experts.{e}.w3.weight",
    "mlp.experts.w_down": "block_sparse_moe.experts.{e}.w2.weight"}
_PHI3 = _LLAMA | dict.fromkeys(("attention.wq", "attention.wk", "attention.wv"), "self_attn.qkv_proj") | dict.fromkeys(
    ("mlp.w_gate", "mlp.w_up"), "mlp.gate_up_proj")
_MIXTURE = {"num_local_experts": "moe.n_experts", "num_experts_per_tok": "moe.experts_per_token",
            "intermediate_size": "moe.d_expert", "sliding_window": "sliding_window"}

# In the order in which an export tries them: the plainest first.
FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama", {}, _LLAMA, _SIZES | {"head_dim": "head_dim"}, demands=_SILU,
        biases={"attention_bias": ("qkv", "out"), "mlp_bias": ("mlp",)}, whole_heads=True),
    "MistralForCausalLM": Family(
        "mistral", {}, _LLAMA, _SIZES | {"head_dim": "head_dim", "sliding_window": "sliding_window"},
        {"sliding_window": 4096, "num_key_value_heads": 8}, _SILU),
    "Phi3ForCausalLM": Family(
        "phi3", {}, _PHI3, _SIZES | {"sliding_window": "sliding_window"},
        {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}, _SILU, scalings=("longrope",), partial=1.0),
    "PhiForCausalLM": Family(
        "phi", {"norm": "layernorm", "activation": "gelu", "parallel_block": True,
                "biases": ("qkv", "out", "mlp", "head")},
        _ENDS | _ATTENTION | {"norm": "model.final_layernorm", "attention_norm": "input_layernorm",
                              "attention.wo": "self_attn.dense", "mlp.w_up": "mlp.fc1", "mlp.w_down": "mlp.fc2"},
        {"layer_norm_eps" if key == "rms_norm_eps" else key: value for key, value in _SIZES.items()},
        {"layer_norm_eps": 1e-5}, {"hidden_act": _GELU, "qk_layernorm": (False,)}, partial=0.5),
    "GPT2LMHeadModel": Family(
        "gpt2", {"norm": "layernorm", "activation": "gelu", "position": "learned", "biases": ("qkv", "out", "mlp")},
        {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head",
         "attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.wq": "attn.c_attn", "attention.wk": "attn.c_attn",
         "attention.wv": "attn.c_attn", "attention.wo": "attn.c_proj", "mlp.w_up": "mlp.c_fc",
         "mlp.w_down": "mlp.c_proj"},
        {"vocab_size": "vocab_size", "n_embd": "d_model", "n_layer": "n_layers", "n_head": "n_heads",
         "n_inner": "d_ff", "n_positions": "context_length", "layer_norm_epsilon": "norm_eps",
         "initializer_range": "init_std", "tie_word_embeddings": "tied_embeddings"},
        {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        {"activation_function": _GELU, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
         "add_cross_attention": (False,)}, whole_heads=True, layers="transformer.h", transposed=True),
    "MixtralForCausalLM": Family(
        "mixtral", {}, _MIXTRAL, _SIZES | _MIXTURE | {"head_dim": "head_dim"},
        {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}, _SILU, needs=("moe.n_experts",)),
    "PhimoeForCausalLM": Family(
        "phimoe", {"norm": "layernorm", "moe.router": "sparsemixer"}, _MIXTRAL,
        _SIZES | _MIXTURE | {"head_dim": "head_dim", "router_jitter_noise": "moe.jitter"},
        {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "router_jitter_noise": 0.01}, _SILU,
        {"attention_bias": ("qkv", "out"), "lm_head_bias": ("head",)}, needs=("moe.n_experts",),
        scalings=("longrope",), mscale=True, short_only=True),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3", {"moe.router": "sigmoid"},
        _LLAMA | {
            "attention.wq_down": "self_attn.q_a_proj", "attention.q_norm": "self_attn.q_a_layernorm",
            "attention.wq": "self_attn.q_b_proj", "attention.wkv_down": "self_attn.kv_a_proj_with_mqa",
            "attention.kv_norm": "self_attn.kv_a_layernorm", "attention.wkv": "self_attn.kv_b_proj",
            "mlp.router": "mlp.gate", "mlp.selection_bias": "mlp.gate.e_score_correction_bias"}
        | {f"mlp.experts.w_{x}": f"mlp.experts.{{e}}.{x}_proj.weight" for x in ("gate", "up", "down")}
        | {f"mlp.shared.w_{x}": f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")},
        _SIZES | {
            "kv_lora_rank": "mla.kv_rank", "q_lora_rank": "mla.q_rank",
            "qk_rope_head_dim": "mla.rope_dim", "v_head_dim": "mla.v_dim", "n_routed_experts": "moe.n_experts",
            "num_experts_per_tok": "moe.experts_per_token", "moe_intermediate_size": "moe.d_expert",
            "n_shared_experts": "moe.n_shared_experts", "first_k_dense_replace": "moe.n_dense_layers",
            "n_group": "moe.n_groups", "topk_group": "moe.groups_per_token",
            "routed_scaling_factor": "moe.weight_scale"},
        # of the whole model, so that a file may leave out what no tensor shows
        {"num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
         "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
         "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
         "qk_nope_head_dim": 128, "v_head_dim": 128},
        # the norms of their latents have 1e-6 whatever rms_norm_eps is; ours have one eps
        _SILU | {"rms_norm_eps": (1e-6,), "attention_bias": (False,), "rope_interleave": (True,),
                 "norm_topk_prob": (True,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        needs=("mla.kv_rank", "moe.n_experts", "moe.n_shared_experts"), paired=("attention.wq", "attention.wkv_down"),
        unturned="qk_nope_head_dim", predicts=True),
}

_V3 = FAMILIES["DeepseekV3ForCausalLM"]
FAMILIES["DeepseekV2ForCausalLM"] = replace(  # the same attention, and a plainer router
    _V3, model_type="deepseek_v2", ours={"moe.router": "softmax_of_all"},
    settings={theirs: ours for theirs, ours in _V3.settings.items() if "group" not in theirs},
    defaults={"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407,
              "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
              "v_head_dim": 128},
    demands=_SILU | {"rms_norm_eps": (1e-6,), "attention_bias": (False,), "mlp_bias": (False,),
                     "norm_topk_prob": (False,), "topk_method": ("greedy",)}, predicts=False)


# --- Tensors ----------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """One tensor of theirs, and the tensors of ours, or experts in them, that it is made of, row after row."""

    name: str
    parts: list[Tensor]
    transposed: bool
    paired: tuple[int, int] | None  # (rows of a head, those of them that are turned)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of theirs."""
        first = self.parts[0].shape
        shape = (sum(len(part) for part in self.parts), *first[1:])
        return shape[::-1] if self.transposed else shape

    def gather(self) -> Tensor:
        """Theirs, out of ours."""
        rows = torch.cat(self.parts) if len(self.parts) > 1 else self.parts[0]
        if self.paired:
            rows = self._reorder(rows, lambda turned: turned.unflatten(1, (2, -1)))
        return rows.T.contiguous() if self.transposed else rows

    @torch.no_grad()
    def scatter(self, theirs: Tensor) -> None:
        """Writes theirs into ours."""
        rows = theirs.T if self.transposed else theirs
        if self.paired:
            rows = self._reorder(rows, lambda turned: turned.unflatten(1, (-1, 2)))
        for part, piece in zip(self.parts, rows.split([len(part) for part in self.parts]), strict=True):
            part.copy_(piece)

    def _reorder(self, rows: Tensor, cut) -> Tensor:
        """Neighbours (x[2i], x[2i+1]) and halves (x[i], x[i + R/2]) are each other's transpose."""
        head, turned = self.paired
        plain, pairs = rows.unflatten(0, (-1, head)).split((head - turned, turned), dim=1)  # (H, ., D) each
        return torch.cat((plain, cut(pairs).transpose(1, 2).flatten(1, 2)), dim=1).flatten(0, 1)


def links(family: Family, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Link]:
    """Every tensor of theirs by its name. `tensors` are our model's, its gradients, or their shapes on meta."""
    found: dict[str, Link] = {}
    modules = family.modules
    if config.mla.kv_rank and not config.mla.q_rank:
        modules = modules | {"attention.wq": "self_attn.q_proj"}
    for ours, tensor in tensors.items():
        block = re.match(r"blocks\.(\d+)\.", ours)
        place = f"{family.layers}.{block[1]}." if block else ""
        inner = ours[block.end():] if block else ours
        module, _, kind = inner.rpartition(".")
        theirs = place + (modules[inner] if inner in modules else f"{modules[module]}.{kind}")
        heads = {"attention.wq": config.head_dim, "attention.wkv_down": config.mla.kv_rank + config.mla.rope_dim}
        paired = (heads[module], config.mla.rope_dim) if module in family.paired else None
        transposed = family.transposed and bool(block) and tensor.ndim == 2
        experts = tensor.unbind() if "{e}" in theirs else [tensor]
        for e, part in enumerate(experts):
            name = theirs.format(e=e)
            found.setdefault(name, Link(name, [], transposed, paired)).parts.append(part)
    return found
