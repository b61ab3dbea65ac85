"""A plan as a page that can be checked line by line."""

from __future__ import annotations

from dataclasses import fields

from nanomai.planner.plan import OVERLAPPED, Assumptions, Plan

WHAT = {
    "weights": "float32, sharded", "gradients": "float32; whole between micro-batches", "optimizer": "float32, sharded",
    "gathered": "layers at work, in the dtype of products", "activations": "kept for the backward",
    "logits": "of a chunk of tokens, and the head's gradient",
    "work": "a layer's gradients, and what its backward computes again",
    "peak": "", "headroom": "for the allocator, the driver, collectives", "device": "",
    "products": "matrix products", "attention": "scores and their products with values",
    "traffic": "norms, gates, residuals: bound by memory", "tensor": "gathers and scatters, waited for",
    "context": "keys and values, waited for", "expert": "tokens to experts and back, waited for",
    "bubble": "stages that wait for their first and after their last micro-batch",
    "exposed": "of what runs beside arithmetic, what is longer than it", "optimizer step": "bound by memory",
    "waiting": "for the slowest machine", "step": "", "hidden": "runs beside arithmetic; not in the sum"}


def short(number: float, digits: int = 3) -> str:
    """12288 -> 12.3 K"""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.{digits}g} {unit}" if number < 1000 * size else f"{number:.2e}"
    return f"{number:.{digits}g}"


def page(plan: Plan) -> str:
    """All of a plan, with what was assumed."""
    memory, time, run, speed, batch = plan.memory, plan.time, plan.run, plan.speed, plan.batch
    sizes = [f"{axis} {n}" for axis, n in plan.layout.items() if not isinstance(n, str | bool) and n > 1]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [f"{plan.name} on {plan.gpus:,} x {plan.gpu}: {verdict}", "",
             f"layout       {' x '.join(sizes) or 'one process'}; recompute {plan.layout['recompute']}"
             + ("; keep_gathered" if plan.layout["keep_gathered"] else ""),
             f"step         {batch['tokens']:,} tokens in sequences of {batch['sequence_length']:,}; each rank has "
             f"{batch['micro_batches']} micro-batches of {batch['micro_batch']}",
             f"parameters   {plan.parameters['total']:,}; a token meets {plan.parameters['active']:,}",
             f"FLOPs        {plan.flops['per_token']:.4g} a token (attention causal); "
             f"{plan.flops['computed_per_token']:.4g} with what is computed again",
             "", "memory of one GPU, GB (10^9 bytes), at the worst moment of a step"]
    lines += [f"  {part:12s}{memory[part] / 1e9:9.2f}  {WHAT[part]}".rstrip() for part in memory]
    lines += ["", "sent by one GPU in a step, GB"]
    lines += [f"  {axis:16s}{sent / 1e9:9.2f}" + ("  beside arithmetic" if axis in OVERLAPPED else "  waited for")
              for axis, sent in plan.communication.items() if sent] or ["  nothing"]
    lines += ["", "seconds of a step"]
    for part, seconds in time.items():
        word = WHAT["optimizer step" if part == "optimizer" else part]
        lines += [f"  {part:12s}{seconds:9.3f}  {word}".rstrip()] if seconds or part == "step" else []
    lines += ["", f"speed        {speed['tokens_per_second']:,.0f} tokens a second, "
              f"{speed['tokens_per_second_per_gpu']:,.0f} a GPU; MFU {speed['mfu']:.1%} (causal)",
              f"the run      {short(run['tokens'])} tokens, {run['flops']:.3g} FLOPs: {run['days']:,.3g} days, "
              f"{short(run['gpu_hours'])} GPU-hours",
              f"             {short(run['dollars'])} dollars, {short(run['kwh'])} kWh, {short(run['co2_kg'] / 1000)} t "
              "of CO2", "", "assumed"]
    docs = _explained()
    for name, value in plan.assumptions.items():
        lines.append(f"  {name:18s}{value if isinstance(value, str) else format(value, '.6g'):>14}  {docs.get(name, '')}".rstrip())
    return "\n".join(lines)


def _explained() -> dict[str, str]:
    """The line under each field of `Assumptions`; only the source has them."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(Assumptions))).body[0].body
    known = {field.name for field in fields(Assumptions)}
    return {a.target.id: b.value.value for a, b in zip(body, body[1:], strict=False)
            if isinstance(a, ast.AnnAssign) and a.target.id in known}
