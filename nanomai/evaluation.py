"""How good a model is: nats per token, and bits per byte, which no choice of tokenizer can flatter."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nanomai import ops
from nanomai.data import Batch, Validation, make_batch
from nanomai.layers import evaluating
from nanomai.model import Transformer
from nanomai.tokenizer import Tokenizer


class EvaluationError(ValueError):
    """A text that cannot be measured: one line that says why."""


class Evaluation(NamedTuple):
    """How well a model predicted a text."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate(model: Transformer, tokenizer: Tokenizer, batches: Iterable[Batch],
             sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x) -> Evaluation:
    """Cross-entropy over all targets of `batches`, on every rank together.

    Bits per byte divides the bits by the UTF-8 bytes of the predicted tokens; the special tokens between documents
    cost bits and bring no bytes. The model sees each window alone, up to T tokens of context.
    """
    device = next(model.parameters()).device
    sizes = torch.as_tensor(tokenizer.token_bytes, dtype=torch.float64)
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for batch in batches:
        valid = batch.targets[batch.targets != ops.IGNORE]
        with evaluating(model):
            nats = model(*(x.to(device) for x in batch), reduction="sum")
        total += torch.tensor([nats.item(), valid.numel(), sizes[valid].sum().item()], dtype=torch.float64)
    nats, tokens, n_bytes = sum_over_ranks(total).tolist()
    if not tokens:
        raise EvaluationError("nothing to evaluate: the text has fewer than two tokens")
    return Evaluation(nats / tokens, nats / math.log(2) / max(n_bytes, 1), int(tokens), int(n_bytes))


def evaluate_text(model: Transformer, tokenizer: Tokenizer, text: str, batch_size: int = 16) -> Evaluation:
    """The same of any text, taken as one document."""
    t = model.config.context_length
    ids = torch.tensor([*tokenizer.opening, *tokenizer.encode(text)])
    n = max(1, -(-(len(ids) - 1) // t))
    padded = torch.full((n * t + 1,), ops.IGNORE)
    padded[: len(ids)] = ids
    rows = padded.unfold(0, t + 1, t).numpy()
    batches = (make_batch(rows[i : i + batch_size], tokenizer.end_of_text) for i in range(0, n, batch_size))
    result, n_bytes = evaluate(model, tokenizer, batches), len(text.encode())
    # a published tokenizer may put a blank before the text, or normalise it
    return result._replace(bits_per_byte=result.loss * result.tokens / math.log(2) / n_bytes, bytes=n_bytes)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors make of the same text: a model must do better to have learned anything."""
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def validation_text(validation: Validation, tokenizer: Tokenizer) -> bytes:
    """The validation split as it was written."""
    between = {tokenizer.end_of_text, *tokenizer.opening}
    return b"".join(tokenizer.decode_bytes(token for token in shard.tolist() if token not in between)
                    for shard in validation.windows.shards)
