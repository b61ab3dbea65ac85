"""Plans as pages that can be checked line by line."""

from __future__ import annotations

import ast
import inspect
import itertools

from nanomai.planner.devices import Device
from nanomai.planner.plan import OVERLAPPED, Assumptions, Plan

BEST = 5  # of the layouts that fit
WHAT = {
    "weights": "float32, sharded", "gradients": "float32: of all micro-batches before, and of this",
    "optimizer": "float32, sharded", "gathered": "layers at work, in the dtype of products",
    "activations": "kept for the backward", "logits": "of a chunk of tokens, and the head's gradient",
    "work": "a layer's gradients, and what its backward computes again",
    "headroom": "for the allocator, the driver, collectives", "products": "matrix products",
    "attention": "scores, and their products with values", "traffic": "norms, gates, residuals: bound by memory",
    "tensor": "gathers and scatters, waited for", "context": "for attention, waited for",
    "expert": "tokens to experts and back, waited for", "bubble": "stages that wait for micro-batches",
    "exposed": "of what is sent beside arithmetic, what takes longer than it", "optimizer's": "bound by memory",
    "waiting": "for the slowest machine", "hidden": "sent beside arithmetic: not in the sum"}


def short(number: float) -> str:
    """12288 -> 12.3 K"""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:,.3g} {unit}"
    return f"{number:.3g}"


def layout_of(found: Plan) -> str:
    """tensor 8 x fsdp 16; recompute full"""
    sizes = [f"{axis} {n}" + f" by {found.layout['context_by']}" * (axis == "context")
             for axis, n in found.layout.items() if not isinstance(n, str | bool) and n > 1]
    kept = "; keep_gathered" if found.layout["keep_gathered"] else ""
    return f"{' x '.join(sizes) or 'one process'}; recompute {found.layout['recompute']}{kept}"


def plan(found: Plan) -> str:
    """All of a plan, with what was assumed."""
    run, speed, batch, flops = found.run, found.speed, found.batch, found.flops
    device = found.assumptions["device_memory"] / 1e9
    lines = [
        f"{found.name} on {found.gpus:,} x {found.gpu}: {'fits' if found.fits else 'DOES NOT FIT'}", "",
        f"layout      {layout_of(found)}",
        f"step        {batch['tokens']:,} tokens in sequences of {batch['sequence_length']:,}; a rank has "
        f"{batch['micro_batches']} micro-batches of {batch['micro_batch']}",
        f"parameters  {found.parameters['total']:,}; a token meets {found.parameters['active']:,}",
        f"FLOPs       {flops['per_token']:.5g} a token, attention causal; {flops['computed_per_token']:.5g} with what "
        "is computed twice", "", f"memory of one GPU at the worst moment of a step, GB (10^9 bytes), of {device:g}"]
    lines += [_row(part, f"{size / 1e9:.2f}", WHAT.get(part)) for part, size in found.memory.items() if size]
    lines += ["", "sent by one GPU in a step, GB"]
    lines += [_row(axis, f"{sent / 1e9:.2f}", "beside arithmetic" if axis in OVERLAPPED else "waited for")
              for axis, sent in found.communication.items() if sent] or ["  nothing"]
    lines += ["", "seconds of a step"]
    lines += [_row(part, f"{seconds:.3f}", WHAT.get("optimizer's" if part == "optimizer" else part))
              for part, seconds in found.time.items() if seconds]
    lines += ["", f"speed       {short(speed['tokens_per_second'])} tokens a second, "
              f"{speed['tokens_per_second_per_gpu']:,.5g} a GPU; MFU {speed['mfu']:.1%}, attention causal",
              f"the run     {short(run['tokens'])} tokens, {run['flops']:.3g} FLOPs: {_days(run['days'])} days, "
              f"{short(run['gpu_hours'])} GPU-hours",
              f"            {short(run['dollars'])} dollars, {short(run['kwh'])} kWh, {short(run['co2_kg'] / 1000)} t "
              "of CO2", "", "assumed"]
    docs = _explained(Assumptions, "") | _explained(Device, "device_")
    lines += [_row(name, value if isinstance(value, str) else f"{value:.6g}", docs.get(name))
              for name, value in found.assumptions.items() if name != "device_name"]
    return "\n".join(lines)


def search(fitting: list[Plan], failed: dict[str, int]) -> str:
    """The best few, and one line for each reason of the others."""
    lines = [f"{len(fitting)} layouts fit; the fastest:" if fitting else "no layout fits"]
    lines += [f"  {_days(found.run['days']):>8} days  MFU {found.speed['mfu']:5.1%}  "
              f"{found.memory['peak'] / 1e9:6.1f} GB  micro-batch {found.batch['micro_batch']}  {layout_of(found)}"
              for found in fitting[:BEST]]
    lines += [f"{sum(failed.values())} do not:"] if failed else []
    return "\n".join(lines + [f"  {number:6d}  {reason}" for reason, number in failed.items()])


def largest(named: Plan | None, plain: Plan) -> str:
    """Two sentences."""
    def said(found: Plan) -> str:
        return (f"{found.name}, {short(found.parameters['total'])} parameters, {found.memory['peak'] / 1e9:.1f} GB a "
                f"GPU with {layout_of(found)}, {short(found.speed['tokens_per_second'])} tokens a second")

    return "\n".join([
        f"on {plain.gpus:,} x {plain.gpu}, with a tenth of the memory left free:",
        f"  of scale_configs/, at its own length: {said(named) if named else 'none'}",
        f"  of a plain shape (d = 128 layers, SwiGLU, 32,768 tokens known, 4,096 in a row): {said(plain)}"])


def _days(days: float) -> str:
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}"


def _row(name: str, value: str, what: str | None) -> str:
    return f"  {name:17s}{value:>11}  {what or ''}".rstrip()


def _explained(kind: type, prefix: str) -> dict[str, str]:
    """The line under each field of a dataclass, which its source alone has."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {prefix + field.target.id: text.value.value
            for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)}
