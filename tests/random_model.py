"""What tests of whole models share: a tiny one whose weights are far from their first values, something to read, and
writing as it is defined, without a cache."""

import torch

from nanomai.architecture import ModelConfig
from nanomai.model import Transformer, build_model

V, CONTEXT = 53, 24
TINY = ModelConfig(n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, vocab_size=V,
                   context_length=CONTEXT)


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    """Biases and norms do something too, and attention is far from even; not in training."""
    model, draw = build_model(config).to(dtype), torch.Generator().manual_seed(1)
    model.compute_dtype = dtype
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.3)
    return model.eval()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """A pass over the whole text for each token; a text that has outgrown the context goes on from its last half."""
    text, context = list(prompt), model.config.context_length
    written = []
    for _ in range(n):
        if len(text) > context:
            text = text[-(context // 2) :]
        written.append(model(torch.tensor([text]))[0, -1].argmax().item())
        text.append(written[-1])
    return written
