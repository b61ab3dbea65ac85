"""Every family by configuration alone: the same numbers as `transformers`, forward and backward.

Random weights of tiny models at odd sizes, carried over by hub's tables. In float32 the two must agree to 1e-5; in
bfloat16 our error against float64 must be no more than 1.5 times theirs. Planted mistakes must all be seen.
"""

import copy
import dataclasses
import functools
import re

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from nanomai import moe, ops
from nanomai import rope as positions
from nanomai.architecture import RopeScaling
from nanomai.config_file import config_from_dict, load_config
from nanomai.hub.families import FAMILIES, links
from nanomai.hub.settings import config_of
from nanomai.model import Transformer
from nanomai.sampling import KVCache

SIZES = {"vocab_size": 61, "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 32, "pad_token_id": None,
         "bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 44,
        "bos_token_id": None, "eos_token_id": None}
LATENT = SIZES | {
    "num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "moe_intermediate_size": 14, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1}
PLAIN_LATENT = {key: value for key, value in LATENT.items() if "group" not in key} | {
    "q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.7}
FACTORS = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.5]}


def rope(kind="default", theta=1e4, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def longrope(original, **more):
    return {"original_max_position_embeddings": original} | rope(
        "longrope", original_max_position_embeddings=original, **FACTORS, **more)


def llama3(original):
    return rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=original)


def yarn(original, **more):
    """Betas with which the ramp reaches over most of a few pairs."""
    return rope("yarn", 100.0, **{"factor": 4.0, "beta_fast": 1.5, "beta_slow": 0.1,
                                  "original_max_position_embeddings": original} | more)


PHI = SIZES | {"num_key_value_heads": 4, "intermediate_size": 44, "hidden_size": 40}
PHIMOE = SIZES | {"num_local_experts": 5, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.1}
ALL_COMPETE = {"router_jitter_noise": 1.0}
MSCALE = {"short_mscale": 1.24, "long_mscale": 1.24}
CASES = {  # 19 tokens long: beyond the windows, and beyond an original context of 8 or 12
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "phi-1": ("PhiForCausalLM", PHI | rope(partial_rotary_factor=0.6)),
    "phi-3": ("Phi3ForCausalLM", SIZES | {"sliding_window": 7}),
    "phi-3-short": ("Phi3ForCausalLM", SIZES | longrope(20)),
    "phi-3-long": ("Phi3ForCausalLM", SIZES | longrope(12)),
    "phi-3.5-moe": ("PhimoeForCausalLM", PHIMOE | {"sliding_window": 9} | rope()),
    "phi-3.5-moe-short": ("PhimoeForCausalLM", PHIMOE | ALL_COMPETE | longrope(20, **MSCALE)),
    "phi-3.5-moe-long": ("PhimoeForCausalLM", PHIMOE | ALL_COMPETE | longrope(12, **MSCALE)),
    "llama-2": ("LlamaForCausalLM", SIZES),
    "llama-3": ("LlamaForCausalLM", SIZES | {"rms_norm_eps": 1e-5} | rope(theta=5e5)),
    "llama-3.1": ("LlamaForCausalLM", SIZES | llama3(8)),
    "llama-tied": ("LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaForCausalLM", SIZES | rope("linear", factor=3.0)),
    "llama-yarn": ("LlamaForCausalLM", SIZES | {"head_dim": 16} | yarn(12)),
    "llama-yarn-between": ("LlamaForCausalLM", SIZES | {"head_dim": 16} | yarn(
        12, truncate=False, attention_factor=1.3)),
    "mistral": ("MistralForCausalLM", SIZES | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5}),
    "mixtral": ("MixtralForCausalLM", SIZES | {"num_local_experts": 5}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", LATENT),
    "deepseek-v3-yarn": ("DeepseekV3ForCausalLM", LATENT | {"qk_rope_head_dim": 8} | yarn(
        12, factor=40.0, mscale=0.7, mscale_all_dim=1.0)),
    "deepseek-v3-straight": ("DeepseekV3ForCausalLM", LATENT | {"q_lora_rank": None}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", PLAIN_LATENT),
    "deepseek-v2-yarn": ("DeepseekV2ForCausalLM", PLAIN_LATENT | {"qk_rope_head_dim": 8} | yarn(
        12, factor=40.0, mscale=0.7, mscale_all_dim=0.7)),
}
T = 19


class PlainRotary(nn.Module):
    """Theirs ignores PhiMoE's long factors; LongRoPE as its paper defines it, with nothing of ours or theirs."""

    def __init__(self, settings, dim):
        super().__init__()
        self.settings, self.dim = settings, dim

    def forward(self, x, position_ids):
        long = int(position_ids.max()) >= self.settings["original_max_position_embeddings"]
        factors = torch.tensor(self.settings["long_factor" if long else "short_factor"])
        frequencies = self.settings["rope_theta"] ** -(torch.arange(0, self.dim, 2) / self.dim) / factors
        angles = position_ids[..., None].float() * frequencies.repeat(2)
        return (angles.cos() * 1.24).to(x.dtype), (angles.sin() * 1.24).to(x.dtype)


@functools.cache
def reference(case):
    """Theirs, with weights that bfloat16 holds exactly; small embeddings, so that the eps of a norm matters."""
    name, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(hf, name.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config"))(**settings)
    theirs = getattr(hf, name)._from_config(config, attn_implementation="eager").eval()
    theirs.set_experts_implementation("eager")  # their grouped product takes no odd widths
    with torch.no_grad():
        for key, p in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if "inv_freq" in key:
                continue
            scale = 0.02 if "embed_tokens" in key or "wte" in key else 0.2 if p.ndim == 1 else p.shape[-1] ** -0.5
            centre = 1.0 if p.ndim == 1 and key.endswith("weight") else 0.0
            p.copy_((centre + scale * torch.randn_like(p)).bfloat16())
    if case == "phi-3.5-moe-long":
        theirs.model.rotary_emb = PlainRotary(config.rope_parameters, 6)
    return theirs


def changed(config, changes):
    """A copy with other values, by dotted names."""
    values = dataclasses.asdict(config)
    for dotted, value in changes.items():
        section, _, key = dotted.rpartition(".")
        (values[section] if section else values)[key] = value
    return config_from_dict({"model": values, "train": {"batch_tokens": config.context_length}}).model


def carried(theirs, changes=None):
    """Ours with their weights; `changes` are wrong settings."""
    settings = theirs.config.to_dict() | {"architectures": [type(theirs).__name__]}
    family, config = config_of(settings)
    config = changed(config, changes or {})
    model = Transformer(config).eval()
    found = links(family, config, model.state_dict())
    given = in_files(theirs, theirs.state_dict())
    for name, link in found.items():
        link.scatter(given[name])
    assert given.keys() - found.keys() <= {"lm_head.weight"}
    return model


def in_files(theirs, tensors):
    """Tensors under the names of files, where experts are not stacked."""
    return revert_weight_conversion(theirs, tensors)


@functools.cache
def ours(case):
    return carried(reference(case))


def random_ids(*shape, seed=1):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def measure(model, ids, blocks):
    """{what: numbers}: logits, the stream after each block, the experts of each token; gradients are left in place."""
    found, hooks = {}, []

    def keep_stream(i):
        return lambda block, inputs, y: found.update({f"block {i}": (y[0] if isinstance(y, tuple) else y).detach()})

    def keep_experts(i):
        def hook(experts, inputs):
            weights, chosen = sorted(inputs[1:], key=lambda x: not x.is_floating_point())
            heaviest = chosen.gather(-1, weights.argmax(-1, keepdim=True))  # of SparseMixer's two, who came second
            found[f"experts {i}"] = torch.cat((chosen.sort(-1).values, heaviest), dim=-1)
        return hook

    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(keep_stream(i)))
        if hasattr(block.mlp, "experts"):
            hooks.append(block.mlp.experts.register_forward_pre_hook(keep_experts(i)))
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).bfloat16()).sum().backward()
    return found | {"logits": logits.detach()}


def of_theirs(theirs, ids):
    layers = theirs.transformer.h if hasattr(theirs, "transformer") else theirs.model.layers
    found = measure(theirs, ids, layers)
    return found | in_files(theirs, {name: p.grad for name, p in theirs.named_parameters()})


def of_ours(model, ids, family):
    found = measure(model, ids, model.blocks.values())
    grads = {name: p.grad for name, p in model.named_parameters()}
    return found | {name: link.gather() for name, link in links(family, model.config, grads).items()}


def family_of(case):
    return FAMILIES[CASES[case][0]]


def distance(a, b):
    return float((a.double() - b.double()).norm())


def compare(model, case):
    """AssertionError unless all that `measure` gives is theirs to 1e-5."""
    ids = random_ids(2, T)
    mine, theirs = of_ours(model, ids, family_of(case)), of_theirs(reference(case), ids)
    assert theirs.keys() - mine.keys() <= {"lm_head.weight"}
    for name, value in mine.items():
        error, size = distance(value, theirs[name]), float(theirs[name].double().norm())
        if name == "logits" or name.startswith("block"):
            error, size = float((value - theirs[name]).abs().max()), float(theirs[name].abs().max())
        assert error <= (0 if name.startswith("experts") else 1e-5 * (1 + size)), f"{name}: {error:.1e} from theirs"


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_streams_and_gradients(case):
    compare(ours(case), case)


# --- In use: padding, and a token at a time ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_padded_batches(case):
    ids, pads = random_ids(3, T, seed=3), torch.tensor([0, 4, 9])
    seen = torch.arange(T) >= pads[:, None]  # (B, T)
    positions = (torch.arange(T) - pads[:, None]).clamp_min(0)
    with torch.no_grad():
        theirs = reference(case)(ids, attention_mask=seen.long(), position_ids=positions, use_cache=False).logits
        mine = ours(case)(ids, cache=KVCache(ours(case), 3, T, pads))
    torch.testing.assert_close(mine[seen], theirs[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_token_by_token(case):
    """A cache of ours against their whole forward pass; 13 tokens come first, so that LongRoPE is where it stays."""
    ids, model = random_ids(2, T, seed=4), ours(case)
    cache = KVCache(model, 2, T)
    with torch.no_grad():
        theirs = reference(case)(ids, use_cache=False).logits
        pieces = [model(piece, cache=cache) for piece in (ids[:, :13], *ids[:, 13:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), theirs, rtol=1e-5, atol=1e-5)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


# In these it is a matter of rounding which experts are taken; others of their class have the same numbers to round.
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"phi-3.5-moe", "phi-3.5-moe-short", "deepseek-v2-yarn"}))
def test_bfloat16_is_as_near_to_float64_as_theirs(case):
    truth, rounded = copy.deepcopy(reference(case)).double(), copy.deepcopy(reference(case)).bfloat16()
    model = copy.deepcopy(ours(case))
    model.compute_dtype = torch.bfloat16
    errors, counted = {}, 0
    for seed in range(60):
        ids = random_ids(1, T, seed=seed)
        exact = of_theirs(truth, ids)
        both = [of_ours(model, ids, family_of(case)), of_theirs(rounded, ids)]
        experts = {name for name in exact if name.startswith("experts")}
        if any(not torch.equal(found[name], exact[name]) for found in both for name in experts):
            continue  # a rounded score has sent a token to another expert, here or there: whose error grows is chance
        counted += 1
        for name in exact.keys() & both[0].keys() - experts:
            squares = [distance(found[name], exact[name]) ** 2 for found in both]
            whole = re.sub(r"experts\.\d+", "experts", name)  # a parameter of theirs holds all experts
            errors[whole] = [a + b for a, b in zip(errors.get(whole, [0, 0]), squares, strict=True)]
        if counted == 8:
            break
    assert counted == 8
    assert {name: (a / b) ** 0.5 for name, (a, b) in errors.items() if a > 1.5**2 * b} == {}


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gpt2", "phi-3-long", "mistral", "mixtral", "deepseek-v3", "deepseek-v3-yarn"])
def test_twenty_steps_of_fine_tuning_follow_theirs(case):
    """The same loss step for step; they drop nothing out, and choose experts without drawing."""
    losses = []
    for model in (copy.deepcopy(ours(case)), copy.deepcopy(reference(case))):
        optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), random_ids(4, T + 1, seed=7)
        for _ in range(20):
            logits = model(ids[:, :-1])
            loss = nn.functional.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    mine, theirs = torch.tensor(losses).view(2, 20)
    assert theirs[-1] < theirs[0] - 0.3  # it learns
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)


# --- SparseMixer in training ------------------------------------------------------------------------------------------


def test_the_estimator_of_sparsemixer(monkeypatch):
    """Values and gradients of their function, with the same draws."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self)  # theirs draws its last numbers twice
    logits = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    upstream = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    config = moe.MoEConfig(n_experts=6, d_expert=1, router="sparsemixer", jitter=0.4)
    torch.manual_seed(2)
    route = moe.sparsemixer_route(logits, config, None, training=True)
    mine = torch.autograd.grad((route.weights * upstream).sum(), logits)[0]
    torch.manual_seed(2)
    weights, experts = sparsemixer(logits, jitter_eps=0.4, training=True)
    theirs = torch.autograd.grad((weights * upstream).sum(), logits)[0]
    assert torch.equal(route.experts, experts) and 100 < (experts != logits.topk(2).indices).any(-1).sum() < 400
    torch.testing.assert_close(route.weights, weights, rtol=2e-4, atol=0)  # they write a third as 0.3333
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_balance_loss_of_mixtral():
    """Theirs sums over the choices of a token, ours is their mean: the same gradients at twice the weight."""
    config = load_config("mixtral-8x7b").model.moe
    logits = torch.randn(40, config.n_experts, generator=torch.Generator().manual_seed(0))
    mine = moe.router_loss(moe.softmax_route(logits, config, None, training=True), config)
    theirs = load_balancing_loss_func((logits,), config.n_experts, config.experts_per_token)
    torch.testing.assert_close(mine, hf.MixtralConfig().router_aux_loss_coef * theirs)


# --- Planted mistakes -------------------------------------------------------------------------------------------------

SETTINGS = [
    ("mistral", {"sliding_window": 6}), ("mistral", {"sliding_window": 4}), ("mistral", {"sliding_window": None}),
    ("phi-3", {"sliding_window": 8}), ("mistral", {"attention_scale": 6**-0.5}),
    ("llama-3", {"rope_theta": 1e4}), ("mixtral", {"rope_theta": 1e4}), ("llama-3", {"norm_eps": 1e-6}),
    ("llama-2", {"norm_eps": 1e-5}), ("deepseek-v3", {"norm_eps": 1e-5}), ("llama-2", {"activation": "gegelu"}),
    ("gpt2", {"activation": "relu2"}), ("phi-1", {"rotary_dim": None}), ("phi-1", {"rotary_dim": 4}),
    ("phi-3-long", {"rope_scaling.attention_factor": 1.0}), ("phi-3-short", {"rope_scaling.original_context": 18}),
    ("phi-3-long", {"rope_scaling.original_context": 19}), ("phi-3.5-moe", {"moe.jitter": 0.01}),
    ("phi-3.5-moe", {"moe.router": "softmax", "moe.jitter": 0.0}), ("llama-3.1", {"rope_scaling.kind": "none"}),
    ("llama-3.1", {"rope_scaling.high_frequency": 5.0}), ("llama-3.1", {"rope_scaling.kind": "linear"}),
    ("deepseek-v3", {"moe.n_groups": 1, "moe.groups_per_token": 1}), ("deepseek-v3", {"moe.groups_per_token": 3}),
    ("deepseek-v3", {"moe.weight_scale": 1.0}), ("llama-2", {"logit_scale": 1.001}),
    ("llama-yarn", {"rope_scaling.kind": "llama3"}), ("llama-yarn", {"rope_scaling.whole_pairs": False}),
    ("llama-yarn", {"rope_scaling.attention_factor": 1.0}), ("llama-yarn", {"rope_scaling.low_frequency": 1.0}),
    ("llama-yarn-between", {"rope_scaling.attention_factor": None}),
    ("deepseek-v3-yarn", {"rope_scaling.mscale": 0.0}), ("deepseek-v3-yarn", {"rope_scaling.mscale": 1.0}),
    ("deepseek-v3-yarn", {"rope_scaling.original_context": 20}),
]


@pytest.mark.parametrize("case, mistake", SETTINGS, ids=str)
def test_a_wrong_setting_is_seen(case, mistake):
    with pytest.raises(AssertionError, match="from theirs"):
        compare(carried(reference(case), mistake), case)


def swap(first, second):
    def plant(model, monkeypatch):
        for block in model.blocks.values():
            a, b = block.get_parameter(first), block.get_parameter(second)
            a.data, b.data = b.data, a.data
    return plant


def change(name, new):
    """Another value of one parameter or buffer."""
    def plant(model, monkeypatch):
        tensor = model.state_dict()[name]
        tensor.copy_(new(tensor.clone()))
    return plant


def another(place, name, make):
    """Another function in place of the one that stands at `place`."""
    return lambda model, monkeypatch: monkeypatch.setattr(place, name, make(getattr(place, name)))


def as_if_paired(rotary):
    """Neighbours turned, as in a file that was copied without reordering its rows."""
    def turn(x, cos, sin):
        y = rotary(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)
        return y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return turn


def renormalised(route):
    """The other family's habit: weights that sum to one, or that do not."""
    def changed_route(logits, config, bias, training):
        found = route(logits, config, bias, training)
        return found._replace(weights=found.scores.gather(-1, found.experts))
    return changed_route


def biased_weights(route):
    def changed_route(logits, config, bias, training):
        found = route(logits, config, bias, training)
        weights = (logits.sigmoid() + bias).gather(-1, found.experts)
        return found._replace(weights=weights / weights.sum(-1, keepdim=True) * config.weight_scale)
    return changed_route


def unbiased(route):
    return lambda logits, config, bias, training: route(logits, config, None, training)


def one_softmax(route):
    """SparseMixer's second weight from the first one's competitors."""
    def changed_route(logits, config, bias, training):
        found = route(logits, config, bias, training)
        return found._replace(weights=logits.softmax(-1).gather(-1, found.experts))
    return changed_route


def reversed_ramp(frequencies):
    """What should stay is stretched, and what should be stretched stays."""
    def changed_frequencies(config, *rest):
        plain = dataclasses.replace(config, rope_scaling=RopeScaling())
        return frequencies(plain, *rest) * (1 + 1 / config.rope_scaling.factor) - frequencies(config, *rest)
    return changed_frequencies


def betas_swapped(model, monkeypatch):
    """Past the check of settings, which refuses it."""
    scaling = model.config.rope_scaling
    swapped = {"low_frequency": scaling.high_frequency, "high_frequency": scaling.low_frequency}
    vars(scaling).update(swapped)


def no_mscale(model, monkeypatch):
    for block in model.blocks.values():
        block.attention.q_scale = 1.0


def mistake_of_router(kind, make):
    return lambda model, monkeypatch: monkeypatch.setitem(moe.ROUTERS, kind, make(moe.ROUTERS[kind]))


DEEDS = {
    "gate and up swapped": ("llama-2", swap("mlp.w_gate.weight", "mlp.w_up.weight")),
    "gate and up of the experts swapped": ("mixtral", swap("mlp.experts.w_gate", "mlp.experts.w_up")),
    "keys and values swapped": ("phi-3", swap("attention.wk.weight", "attention.wv.weight")),
    "norms swapped": ("llama-2", swap("attention_norm.weight", "mlp_norm.weight")),
    "a square matrix transposed": ("gpt2", change("blocks.1.attention.wo.weight", torch.t)),
    "positions from one on": ("gpt2", change("positions.weight", lambda w: w.roll(-1, 0))),
    "no bias of the head": ("phi-1", change("head.bias", torch.zeros_like)),
    "no bias of the values": ("phi-3.5-moe", change("blocks.0.attention.wv.bias", torch.zeros_like)),
    "an expert in another's place": ("mixtral", change("blocks.2.mlp.experts.w_down", lambda w: w.roll(1, 0))),
    "no shared expert": ("deepseek-v3", change("blocks.2.mlp.shared.w_down.weight", torch.zeros_like)),
    "turned neighbours for halves": ("deepseek-v3", another(ops, "rotary", as_if_paired)),
    "turned the other way": ("phi-3", another(ops, "rotary", lambda f: lambda x, cos, sin: f(x, cos, -sin))),
    "weights that do not sum to one": ("mixtral", mistake_of_router("softmax", renormalised)),
    "the selection bias in the weights": ("deepseek-v3", mistake_of_router("sigmoid", biased_weights)),
    "no selection bias": ("deepseek-v3", mistake_of_router("sigmoid", unbiased)),
    "one softmax for both experts": ("phi-3.5-moe", mistake_of_router("sparsemixer", one_softmax)),
    "a ramp that is reversed": ("deepseek-v3-yarn", another(positions, "frequencies", reversed_ramp)),
    "fast and slow swapped": ("llama-yarn", betas_swapped),
    "no mscale in the scores": ("deepseek-v3-yarn", no_mscale),
    "no gradient through the gate": ("llama-2", another(ops, "swiglu", lambda f: lambda g, u, impl: f(g.detach(), u))),
    "no gradient to the scores": ("mixtral", mistake_of_router("softmax", lambda f: lambda logits, *rest: f(
        logits.detach(), *rest))),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_planted_mistake_is_seen(deed, monkeypatch):
    case, plant = DEEDS[deed]
    model = copy.deepcopy(ours(case))
    plant(model, monkeypatch)
    with pytest.raises(AssertionError, match="from theirs"):
        compare(model, case)
