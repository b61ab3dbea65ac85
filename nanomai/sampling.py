"""Writing with a model: the key-value cache, the ways to choose a token, and streams of text.

Without a cache, token n costs a forward pass over all n tokens before it. Keys and values of the past never change
under a causal mask, so they are kept, and each new token costs one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nanomai import ops
from nanomai.layers import evaluating
from nanomai.model import Transformer
from nanomai.rope import beyond
from nanomai.tokenizer import Tokenizer


class SamplingError(ValueError):
    """A prompt or an option that cannot be sampled with: one line that says what is wrong."""


class LayerCache:
    """Keys and values of one layer, written into room that is set aside once."""

    def __init__(self, batch_size: int, capacity: int, widths: tuple[tuple[int, int], tuple[int, int]], like: Tensor):
        self.keys, self.values = (like.new_empty(batch_size, heads, capacity, width) for heads, width in widths)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v (B, G, T, K); returns all the keys and values so far. Slices, not copies."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k, v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """The past of a batch of sequences. Shorter prompts are padded on the left, so that all rows end together.

    `padding` (B,) counts each row's pads; a row's positions are counted from its own first token.
    """

    def __init__(self, model: Transformer, batch_size: int, capacity: int, padding: Tensor | None = None):
        like = torch.empty(0, dtype=model.compute_dtype, device=next(model.parameters()).device)
        # None for those that another rank has
        self.layers = [LayerCache(batch_size, capacity, model.blocks[name].attention.cache_widths(), like)
                       if name in model.blocks else None for name in map(str, range(model.config.n_layers))]
        self.padding = padding if padding is not None and bool(padding.any()) else None

    @property
    def length(self) -> int:
        return self._first().length

    def _first(self) -> LayerCache:
        return next(filter(None, self.layers))

    def key_positions(self, t: int) -> Tensor:
        """Positions of the past and of `t` new tokens: (S,), or (B, S) and negative at pads."""
        positions = torch.arange(self.length + t, device=self._first().keys.device)
        return positions if self.padding is None else positions - self.padding[:, None]

    def positions(self, t: int) -> tuple[Tensor, Tensor]:
        """Those of `t` new tokens, and of all keys."""
        keys = self.key_positions(t)
        return keys[..., -t:], keys

    def mask(self, queries: Tensor, keys: Tensor, window: int | None) -> Tensor | None:
        """Who may look at whom; None is plainly causal. A pad may look at anything: its output is never read."""
        if self.padding is None:
            return None if window is None else ops.attention_mask(queries, keys, window)
        is_pad = (queries < 0)[:, None, :, None]
        return (ops.attention_mask(queries, keys, window) & (keys >= 0)[:, None, None, :]) | is_pad


def choose(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
           generator: torch.Generator | None = None) -> Tensor:
    """One token for each row of logits (B, V): (B,).

    temperature 0 takes the likeliest. top_k keeps the k likeliest; top_p the fewest whose probabilities reach p
    (nucleus sampling, arXiv 1904.09751); min_p those with at least p times the largest probability (arXiv 2407.01082).
    """
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, temperature, top_k, top_p, min_p), 1, generator=generator)[:, 0]


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                  min_p: float = 0.0) -> Tensor:
    """The distribution that `choose` draws from: (B, V) -> (B, V)."""
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0, however cold: nothing overflows
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it already reach p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    p = logits.softmax(-1)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.max(-1, keepdim=True).values, 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides the positive and multiplies the negative logits of seen tokens by `penalty` (CTRL, arXiv 1909.05858).

    logits (B, V), seen (B, V) boolean.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@torch.no_grad()
def stream(model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float = 0.8,
           top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
           stop_tokens: Sequence[int] = (), vocab_size: int | None = None, seed: int | None = None,
           agree: Callable[[Tensor], Tensor] = lambda token: token) -> Iterator[list[int | None]]:
    """Yields, up to `max_tokens` times, the next token of each prompt; None for a row that has met a stop token.

    A prompt longer than the model's context keeps its end. When the text outgrows the context, its last half is read
    again and the writing goes on from there. `vocab_size` is the tokenizer's, where the model's is padded beyond it:
    the ids above mean nothing and are never chosen. `agree` gives the ranks of a job one choice (B,) for theirs.
    """
    _check(prompts, model)
    if not (max_tokens >= 0 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1
            and repetition_penalty > 0):
        raise SamplingError("max_tokens, temperature and top_k must not be negative, top_p must lie above 0, up to 1, "
                            "min_p from 0 to 1, and repetition_penalty above 0")
    context, device = model.config.context_length, next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
    texts, done = [list(p) for p in prompts], [False] * len(prompts)
    seen = torch.zeros(len(texts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, text in enumerate(texts):
        seen[row, text] = True
    cache = fresh = None
    for written in range(max_tokens):
        full = cache is not None and cache.length == context
        if cache is None or full or _outgrows(model, cache.length):
            # a prompt leaves room for a token; what outgrew its factors is read from where the cache began
            keep = context - 1 if cache is None else context // 2 if full else cache.length + 1
            cache, fresh = _prefill(model, [text[-max(1, keep) :] for text in texts], max_tokens - written)
        with evaluating(model):
            logits = model(fresh, cache=cache, last_only=True)[:, -1, :vocab_size]
        if repetition_penalty != 1:
            logits = penalize_repetition(logits, seen[:, :vocab_size], repetition_penalty)
        token = agree(choose(logits, temperature, top_k, top_p, min_p, generator))  # (B,)
        seen.scatter_(1, token[:, None], True)
        fresh, step = token[:, None], token.tolist()
        for row, text in enumerate(texts):
            done[row] = done[row] or step[row] in stop_tokens
            text.append(step[row])
        if all(done):
            return
        yield [None if done[row] else token for row, token in enumerate(step)]


def _outgrows(model: Transformer, length: int) -> bool:
    """Whether the next token turns all keys another way (LongRoPE), so that those in the cache are of no use."""
    return beyond(model.config, length + 1) and not beyond(model.config, length)


def _prefill(model: Transformer, texts: list[list[int]], to_come: int) -> tuple[KVCache, Tensor]:
    """An empty cache with room for what will be written, and the (B, T) ids to fill it with, padded on the left."""
    longest, device = max(map(len, texts)), next(model.parameters()).device
    padding = torch.tensor([longest - len(text) for text in texts], device=device)
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts], device=device)
    return KVCache(model, len(texts), min(model.config.context_length, longest + to_come), padding), ids


def _check(prompts: Sequence[Sequence[int]], model: Transformer) -> None:
    if not prompts or not all(len(p) for p in prompts):
        raise SamplingError("every prompt needs at least one token; begin with the tokenizer's end_of_text")
    if any(not 0 <= token < model.config.vocab_size for p in prompts for token in p):
        raise SamplingError(f"a prompt holds a token outside the vocabulary of {model.config.vocab_size}")


def generate(model: Transformer, prompt_ids: Sequence | Tensor, max_tokens: int = 64, temperature: float = 0.0,
             **options) -> list:
    """The new tokens that follow one prompt (a list of ids), or each of several (a list of lists); see `stream`.

    A tensor (T,) or (B, T) serves as well.
    """
    if isinstance(prompt_ids, Tensor):
        prompt_ids = prompt_ids.tolist()
    single = not prompt_ids or isinstance(prompt_ids[0], int)
    prompts = [prompt_ids] if single else prompt_ids
    written: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_tokens, temperature, **options):
        for row, token in enumerate(step):
            if token is not None:
                written[row].append(token)
    return written[0] if single else written


def stream_text(model: Transformer, tokenizer: Tokenizer, prompt: str, max_tokens: int, **options) -> Iterator[str]:
    """The text that follows `prompt`, piece by piece; a character is held back until its last byte has come."""
    ids, pending = tokenizer.encode(prompt), b""
    last = ids[-1:]
    for (token,) in stream(model, [[*tokenizer.opening, *ids]], max_tokens, stop_tokens=tokenizer.stop_tokens,
                           vocab_size=tokenizer.vocab_size, **options):
        # beside the token before it: where it opens a text, a token of SentencePiece loses its blank
        pending += tokenizer.decode_bytes([*last, token])[len(tokenizer.decode_bytes(last)) :]
        last = [token]
        whole = _whole_characters(pending)
        if whole:
            yield pending[:whole].decode("utf-8", errors="replace")
            pending = pending[whole:]
    if pending:
        yield pending.decode("utf-8", errors="replace")


def _whole_characters(data: bytes) -> int:
    """How many bytes can be shown: all but a UTF-8 character of up to 3 bytes that is still incomplete."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # the first byte of a character, which says how many belong to it
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if back >= needed else len(data) - back
        if byte < 0x80:
            break
    return len(data)
