"""The notebooks can fail. A number that changes, or a bug that is planted in the package, must stop the lesson that
teaches it: nbval's exit code says so, and the first complaint is a claim that no longer holds, not a crash.

Each bug is one edit of one file. It stands here with the text that it changes, which must occur exactly once: where
the package moves on, the test says so. The quickest lessons run in `make test`, the whole table in `make soak`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


class Bug(NamedTuple):
    name: str
    file: str  # in nanomai/; "../triton_kernels/lens.py" is in its neighbour
    sound: str
    broken: str
    soak: bool = False  # only `make soak` runs it


BUGS = {
    "00_map": [
        Bug("parameters: the last norm is not counted", "architecture.py",
            "return v * d + head + positions + final_norm +", "return v * d + head + positions +"),
        Bug("targets are not shifted", "data.py",
            "(ids, rows[:, 1:].copy(), document_ids)", "(ids, rows[:, :-1].copy(), document_ids)", soak=True),
    ],
    "01_bpe": [
        Bug("merges applied in the wrong order", "tokenizer.py",
            "ranks = {token: rank for rank, token in enumerate(tokens)}",
            "ranks = {token: r if r < 256 else len(tokens) + 255 - r for r, token in enumerate(tokens)}"),
        Bug("merges learned from stale counts", "tokenizer.py", "if counts[pair] != -queued:", "if not counts[pair]:"),
        Bug("special tokens read from the user's text", "tokenizer.py", "return self._encoding.encode_ordinary(text)",
            'return self._encoding.encode(text, allowed_special="all")', soak=True),
    ],
    "03_attention": [
        Bug("no causal mask", "masks.py", "allowed = distance >= 0", "allowed = distance == distance"),
        Bug("scores not divided by sqrt(K)", "ops.py", " / math.sqrt(q.shape[-1])", ""),
        Bug("documents see one another", "masks.py",
            "allowed & (query_documents[:, :, None] == key_documents[:, None, :])",
            "allowed.expand(len(query_documents), -1, -1)"),
        Bug("the window is one too wide", "masks.py", "(distance < window)", "(distance <= window)", soak=True),
    ],
    "04_rope_gqa_flash": [
        Bug("RoPE: frequencies off by one", "ops.py",
            "torch.arange(0, dim, 2, device", "torch.arange(2, dim + 2, 2, device"),
        Bug("RoPE: positions off by one", "ops.py",
            "positions.to(frequencies.dtype)[...,", "(positions.to(frequencies.dtype) + 1)[...,", soak=True),
        Bug("query heads dealt to the wrong key head", "ops.py",
            "k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)",
            "k.repeat(1, repeats, 1, 1), v.repeat(1, repeats, 1, 1)"),
    ],
    "05_block_and_model": [
        Bug("RMSNorm forgets eps", "ops.py", "weight.to(wide), eps).to(x.dtype)", "weight.to(wide), 0.0).to(x.dtype)"),
        Bug("SwiGLU: gate and up change places", "ops.py",
            "return F.silu(gate) * up", "return F.silu(up) * gate", soak=True),
        Bug("the tied head does not teach the embedding", "model.py",
            "weight, bias = (self.embed.weight, None)", "weight, bias = (self.embed.weight.detach(), None)"),
        Bug("no norm before the MLP", "model.py", "\n        return x + self.mlp(h, *aux)",
            "\n        return x + self.mlp(x, *aux)", soak=True),
        Bug("initial weights not scaled by depth", "model.py",
            "config.init_std / math.sqrt(2 * config.n_layers)", "config.init_std"),
        Bug("ignored targets have a gradient", "ops.py", "d_logits @ w * valid", "d_logits @ w", soak=True),
    ],
    "05b_families": [
        Bug("parallel block: the MLP reads the stream, not the norm", "model.py",
            "return x + y + self.mlp(h, *aux)", "return x + y + self.mlp(x, *aux)", soak=True),
        Bug("GELU of the other kind", "ops.py", 'approximate="tanh")', 'approximate="none")', soak=True),
        Bug("LayerNorm without its bias", "ops.py",
            "weight.to(x.dtype), bias.to(x.dtype), eps)", "weight.to(x.dtype), 0 * bias.to(x.dtype), eps)", soak=True),
        Bug("partial rotary turns whole heads", "architecture.py",
            "self.head_dim if self.rotary_dim is None else self.rotary_dim", "self.head_dim", soak=True),
        Bug("a window costs as much as none", "architecture.py",
            "seen = 2 * window - window * window // t", "seen = t", soak=True),
        Bug("latents: the shared key is not cached", "architecture.py",
            "values = m.kv_rank + m.rope_dim if", "values = m.kv_rank if", soak=True),
        Bug("learned positions are not added", "model.py",
            "x = x + self.positions(positions.clamp_min(0)).to(x.dtype)", "pass", soak=True),
    ],
    "06_training": [
        Bug("the loss is a mean, its gradient a sum", "ops.py",
            "(log_p.gather(1, target) * valid).sum()", "(log_p.gather(1, target) * valid).mean()"),
        Bug("accumulated gradients not divided by the tokens", "trainer.py",
            "clip_gradients(state.model, self.config.optim.grad_clip, n_valid)",
            "clip_gradients(state.model, self.config.optim.grad_clip, 1.0)", soak=True),
        Bug("AdamW: bias correction one step ahead", "optim.py", '{"step": torch.zeros((),', '{"step": torch.ones((),'),
        Bug("weight decay on everything", "optim.py",
            '"weight_decay": 0.0}', '"weight_decay": config.weight_decay}', soak=True),
        Bug("Muon: a wrong coefficient", "optim.py",
            "NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)", "NEWTON_SCHULZ = (3.4445, -4.7750, 1.0315)"),
        Bug("Muon: no look ahead", "optim.py", "return p.grad.lerp(buffer, momentum)", "return buffer", soak=True),
        Bug("warm-up begins with an idle step", "optim.py",
            "config.lr * (step + 1) / config.warmup_steps", "config.lr * step / config.warmup_steps", soak=True),
        Bug("clipping raises small gradients", "parallel/apply.py",
            "(norm + 1e-6), max=1.0)", "(norm + 1e-6), min=1.0)"),
    ],
    "07_sampling_kv_cache": [
        Bug("temperature upside down", "sampling.py",
            "logits.amax(-1, keepdim=True)) / temperature", "logits.amax(-1, keepdim=True)) * temperature", soak=True),
        Bug("top-p keeps one token too few", "sampling.py",
            "ordered.cumsum(-1) - ordered >= top_p", "ordered.cumsum(-1) >= top_p"),
        Bug("min-p with an absolute limit", "sampling.py",
            "p < min_p * p.max(-1, keepdim=True).values", "p < min_p", soak=True),
        Bug("the repetition penalty raises negative logits", "sampling.py",
            "logits / penalty, logits * penalty)", "logits / penalty, logits / penalty)", soak=True),
        Bug("KV cache: positions off by one", "sampling.py",
            "positions = torch.arange(self.length + t, device=self._first().keys.device)",
            "positions = torch.arange(self.length + t) + (self.length > 0)"),
        Bug("KV cache: pads are read as text", "sampling.py", " & (keys >= 0)[:, None, None, :]", "", soak=True),
        Bug("KV cache: bytes of keys only", "architecture.py",
            "else 2 * self.n_kv_heads * self.head_dim", "else self.n_kv_heads * self.head_dim", soak=True),
        Bug("special tokens read from the user's text", "tokenizer.py", "return self._encoding.encode_ordinary(text)",
            'return self._encoding.encode(text, allowed_special="all")', soak=True),
    ],
    "08_scaling_laws": [
        Bug("FLOPs without the head", "architecture.py",
            "matmul = self.layer_parameters(active=True) + self.vocab_size * self.d_model",
            "matmul = self.layer_parameters(active=True)"),
        Bug("FLOPs with attention twice", "architecture.py",
            "return 6 * matmul + 3 * self.n_layers", "return 6 * matmul + 6 * self.n_layers", soak=True),
        Bug("muP: the logits are not scaled", "model.py",
            "            x = x * self.config.logit_scale\n", "            pass\n", soak=True),
        Bug("the embedding is among the matrices", "optim.py",
            'return is_hidden_matrix(name, parameter) or name == "head.weight"',
            'return is_hidden_matrix(name, parameter) or name == "embed.weight"', soak=True),
        Bug("a batch that grows is counted from the start", "config.py",
            "return [(end - start, tokens) for start, end", "return [(end, tokens) for start, end", soak=True),
    ],
    "09_moe": [
        Bug("experts: results go back by the order itself", "grouped.py",
            "return _ToTokens.apply(rows, pairs.order, pairs.places)",
            "return _ToTokens.apply(rows, pairs.order, pairs.order)", soak=True),
        Bug("softmax router: weights not renormalised", "moe.py",
            "Route(weights / weights.sum(-1, keepdim=True), experts, scores, logits)",
            "Route(weights, experts, scores, logits)", soak=True),
        Bug("the selection bias goes the wrong way", "moe.py",
            "(load.mean() - load).sign()", "(load - load.mean()).sign()", soak=True),
        Bug("the selection bias takes part in the weights", "moe.py",
            "weights = affinity.gather(-1, experts)", "weights = choice.gather(-1, experts)", soak=True),
        Bug("balance loss without the number of experts", "moe.py",
            "balance = config.n_experts * (choices", "balance = (choices", soak=True),
        Bug("the router's losses are left out", "moe.py",
            "            y = _WithLoss.apply(y, router_loss(route, self.config) * aux_scale)\n",
            "            pass\n", soak=True),
        Bug("active parameters without the shared experts", "architecture.py",
            "m.n_experts) + m.n_shared_experts", "m.n_experts)", soak=True),
    ],
    "10_mixed_precision": [
        Bug("mixed precision: the product is computed in float32", "layers.py",
            "return F.linear(x, self.weight.to(x.dtype), bias)",
            "return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)", soak=True),
        Bug("mixed precision: attention's softmax is narrow", "ops.py",
            "(q @ k.transpose(-1, -2)).to(_wide(q))", "(q @ k.transpose(-1, -2))", soak=True),
        Bug("mixed precision: the loss is narrow", "ops.py",
            "logits = F.linear(hidden[rows], w).to(wide)", "logits = F.linear(hidden[rows], w)", soak=True),
        Bug("mixed precision: RMSNorm squares narrow numbers", "ops.py",
            "return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)",
            "return rms_norm_plain(x, weight.to(x.dtype), eps)", soak=True),
        Bug("mixed precision: gradients are summed in bfloat16", "parallel/fsdp.py",
            "reduce_dtype=torch.float32", "reduce_dtype=torch.bfloat16"),
        Bug("float8: gradients are rounded as activations are", "float8.py",
            "quantize(d_y, torch.float8_e5m2)", "quantize(d_y, torch.float8_e4m3fn)", soak=True),
    ],
    "11a_first_kernels": [
        Bug("softmax: what is absent counts as zero", "../triton_kernels/lessons.py",
            'other=-float("inf"))', "other=0.0)"),
        Bug("RMSNorm forgets eps", "../triton_kernels/rms_norm.py", "/ D + eps)", "/ D)", soak=True),
        Bug("RMSNorm backward: a sum for a mean", "../triton_kernels/rms_norm.py",
            "(tl.sum(g * normed, axis=1) / D)", "tl.sum(g * normed, axis=1)", soak=True),
        Bug("RMSNorm: one row a program", "../triton_kernels/rms_norm.py", "max(1, TILE // block)", "1", soak=True),
        Bug("the lens lets short accesses out of bounds pass", "../triton_kernels/lens.py",
            "if addresses.size:", "if addresses.size > 3:"),
        Bug("the lens keeps the order", "../triton_kernels/lens.py",
            "self.random.shuffle(programs)", "pass", soak=True),
        Bug("the lens misses reads of what was written", "../triton_kernels/lens.py",
            '"read": ("write", "atomic")', '"read": ("atomic",)', soak=True),
        Bug("the lens counts numbers, not bytes", "../triton_kernels/lens.py",
            "self.loads[name] += size * addresses.size", "self.loads[name] += addresses.size", soak=True),
        Bug("the compiler is not told what 16 divides", "../triton_kernels/aot.py",
            "if specialise and _divisible(value)", "if specialise and False and _divisible(value)", soak=True),
        Bug("every tensor begins at a multiple of 16", "../triton_kernels/aot.py",
            "return value.storage_offset() * value.element_size() % 16 == 0", "return True", soak=True),
    ],
    "11b_matmul_and_flash_attention": [
        Bug("a group of tiles is walked row by row", "../triton_kernels/matmul.py",
            "return first + within % height, within // height", "return first + within // columns, within % columns"),
        Bug("the last group is as high as the others", "../triton_kernels/matmul.py",
            "height = tl.minimum(GROUP, rows - first)", "height = GROUP", soak=True),
        Bug("flash attention: acc is not rescaled", "../triton_kernels/flash_attention.py",
            "acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision",
            "acc = tl.dot(p.to(v.dtype), v, acc, input_precision", soak=True),
        Bug("flash attention: a window skips no tile", "../triton_kernels/flash_attention.py",
            "begin = tl.maximum(position - window + 1, 0)", "begin = 0 * position", soak=True),
        Bug("flash attention: dq without delta", "../triton_kernels/flash_attention.py",
            " - delta[:, None])", ")", soak=True),
    ],
    "11c_fused_cross_entropy": [
        Bug("online softmax: the old sum is not rescaled", "../triton_kernels/cross_entropy.py",
            "total = total * tl.exp(before - largest) + tl.sum(", "total = total + tl.sum("),
        Bug("all logits are held", "../triton_kernels/linear_cross_entropy.py",
            "buffer = torch.empty((min(rows, N), V)", "buffer = torch.empty((N, V)", soak=True),
        Bug("chunks add up in bfloat16", "ops.py", "d_weight = torch.zeros_like(weight, dtype=wide) if needs_grad",
            "d_weight = torch.zeros_like(weight) if needs_grad", soak=True),
    ],
    "12_memory_and_checkpointing": [
        Bug("kept bytes: one copy of the hidden units is not counted", "planner/counts.py",
            'COPIES = {"swiglu": 4, ', 'COPIES = {"swiglu": 3, ', soak=True),
        Bug("selective recomputation keeps no products", "parallel/recompute.py",
            "keep = op in KEPT or (op.namespace", "keep = (op.namespace", soak=True),
        Bug("full recomputation is left out", "parallel/recompute.py",
            'if what == "none":', 'if what != "selective":', soak=True),
        Bug("checksums are not compared", "checkpoint.py", "if found != named[name]:", "if False:"),
        Bug("a damaged checkpoint ends the search", "checkpoint.py",
            "            complaints.append(str(error))\n", "            return None, [str(error)]\n", soak=True),
    ],
    "13_data_parallel_to_fsdp": [
        Bug("FSDP averages over the ranks", "parallel/fsdp.py",
            "unit.set_gradient_divide_factor(1.0)", "unit.set_gradient_divide_factor(2.0)", soak=True),
        Bug("a block is not dropped after its forward", "parallel/fsdp.py",
            '"reshard_after_forward": not keep_gathered', '"reshard_after_forward": keep_gathered', soak=True),
        Bug("each rank clips by its own norm", "parallel/apply.py", "dist.all_reduce(total)", "pass"),
        Bug("every rank draws the first rows", "parallel/apply.py",
            "return parameter.to_local(), begin", "return parameter.to_local(), (0,) * parameter.ndim", soak=True),
        Bug("all ranks read the same part", "parallel/layout.py",
            "rank = rank * self.sizes[name] + self.grid.get_local_rank(name)", "rank = 0", soak=True),
    ],
    "14_tensor_pipeline_expert_context": [
        Bug("tensor parallel: gradients of what every rank has are not summed", "parallel/shares.py",
            "grad_placements=[Partial()] * ndim if whole else None", "grad_placements=None"),
        Bug("vocabulary parallel: logarithms of sums are added", "parallel/tensor.py",
            "log_sum = log_sums.logsumexp(0)[:, None]", "log_sum = log_sums.sum(0)[:, None]", soak=True),
        Bug("the pipeline runs GPipe's schedule", "parallel/pipeline.py",
            "Schedule1F1B, ScheduleInterleaved1F1B",
            "ScheduleGPipe as Schedule1F1B, ScheduleInterleaved1F1B", soak=True),
        Bug("rows that have come go to the wrong expert", "parallel/expert.py",
            "device=x.device).repeat(size)", "device=x.device).repeat_interleave(size)", soak=True),
        Bug("context parallel: consecutive pieces", "parallel/context.py",
            "(pieces[rank], pieces[-1 - rank])", "(pieces[2 * rank], pieces[2 * rank + 1])", soak=True),
        Bug("context parallel by heads: positions come in the wrong order", "parallel/collectives.py",
            "torch.cat(parts.unbind(), join)", "torch.cat(parts.flip(0).unbind(), join)", soak=True),
    ],
    "15_planning_a_500b_run": [
        Bug("attention is counted without its mask", "architecture.py",
            "6 * matmul + 3 * self.n_layers", "6 * matmul + 6 * self.n_layers"),
        Bug("weights are kept in two bytes", "planner/counts.py",
            '"weights": 4 * held', '"weights": 2 * held', soak=True),
        Bug("a pipeline waits for one stage too many", "planner/plan.py",
            'busy * (s["pipeline"] - 1)', 'busy * s["pipeline"]', soak=True),
        Bug("MFU counts what is computed twice", "planner/plan.py",
            '"mfu": flops["wanted"] * tokens', '"mfu": computed * tokens', soak=True),
        Bug("all hours that are paid for count", "planner/plan.py", "/ 3600 / a.goodput", "/ 3600", soak=True),
    ],
    "22_long_context": [
        Bug("NTK: theta times the factor", "rope.py", "scaling.factor ** (dim / (dim - 2))", "scaling.factor",
            soak=True),
        Bug("LongRoPE: long factors one token too early", "rope.py", "length > config.rope_scaling.original_context",
            "length >= config.rope_scaling.original_context", soak=True),
        Bug("LongRoPE: a cache of short keys is taken", "model.py", "if past and rope.beyond(config, length)",
            "if False and rope.beyond(config, length)", soak=True),
    ],
}
ALL = [(lesson, bug) for lesson, bugs in BUGS.items() for bug in bugs]
QUICKEST = "03_attention"  # to run whole: it stands for the others in `make test`


def cases(rows, soak):
    """Parameters of a test; those for which `soak(*row)` holds are for `make soak`."""
    return [pytest.param(*row, id=" ".join(getattr(x, "name", x) for x in row), marks=[pytest.mark.soak] * soak(*row))
            for row in rows]


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of both packages and of what the lessons read."""
    for folder in ("nanomai", "triton_kernels", "scale_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "lesson.txt", tmp_path / "notebooks")
    shutil.copy(ROOT / "conftest.py", tmp_path)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def planted(bug: Bug) -> str:
    """The text of the file with the bug in it."""
    text = (ROOT / "nanomai" / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.sound) == 1, f"{bug.sound!r} occurs {text.count(bug.sound)} times in {bug.file}"
    broken = text.replace(bug.sound, bug.broken)
    compile(broken, bug.file, "exec")  # a bug, not a typing error
    return broken


def corrupt(notebook) -> None:
    """Changes the first digit that is stored, as a number that no longer holds."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if found := re.search(r"\d", output.get("text", "")):
                at, digit = found.start(), int(found[0])
                output.text = f"{output.text[:at]}{(digit + 1) % 10}{output.text[at + 1:]}"
                return
    raise AssertionError("no number is stored")


def nbval(house: Path, lesson: str, change=None) -> subprocess.CompletedProcess:
    """The lesson in a fresh kernel that imports the copy, up to the first cell that fails."""
    if lesson.startswith("11"):
        pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    notebook = nbformat.read(ROOT / "notebooks" / f"{lesson}.ipynb", as_version=4)
    if change:
        change(notebook)
    path = house / "notebooks" / f"{lesson}.ipynb"
    nbformat.write(notebook, path)
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # the kernel sets it
    roots = [str(house), *filter(None, [environment.get("PYTHONPATH")])]  # the copy first
    environment |= {"PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", house, "-x",
                           "-p", "no:cacheprovider", "--color=no", "--nbval", path],
                          cwd=house, env=environment, capture_output=True, text=True, timeout=400)


def assert_a_claim_failed(done: subprocess.CompletedProcess) -> None:
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)  # IPython colours its tracebacks
    assert done.returncode == 1, said
    assert re.search(r"\b1 failed, [1-9]\d* passed", said), f"the imports must work, then one cell fail:\n{said}"
    claim = re.search(r"^AssertionError +Traceback|outputs differ", said, re.MULTILINE)
    assert claim, f"a crash, not a claim that failed:\n{said}"


@pytest.mark.parametrize("lesson, bug", cases(ALL, lambda lesson, bug: False))
def test_a_bug_can_be_planted(lesson, bug):
    assert planted(bug)
    assert (ROOT / "notebooks" / f"{lesson}.ipynb").exists()


@pytest.mark.parametrize("lesson", cases([(lesson,) for lesson in BUGS], lambda lesson: lesson != QUICKEST))
def test_the_copy_passes_and_a_corrupted_number_fails(lesson, house):
    sound = nbval(house, lesson)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    done = nbval(house, lesson, corrupt)
    assert_a_claim_failed(done)
    assert "outputs differ" in done.stdout


@pytest.mark.parametrize("lesson, bug", cases(ALL, lambda lesson, bug: bug.soak))
def test_a_planted_bug_fails_its_lesson(lesson, bug, house):
    (house / "nanomai" / bug.file).write_text(planted(bug), encoding="utf-8")
    assert_a_claim_failed(nbval(house, lesson))
