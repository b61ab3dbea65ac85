"""nanomai: the whole of large-model training, small enough to read in a weekend.

    import nanomai
    config = nanomai.load_config("nano", **{"train.steps": 200})
    result = nanomai.train(config)
    model, tokenizer, config = nanomai.load_run(result.run_dir)

Names are handed on lazily, so `import nanomai` and the command line's help need no torch.
"""

import importlib

_HOMES = {
    "Config": "config", "ModelConfig": "config", "ConfigError": "config", "load_config": "config_file",
    "build_model": "model", "Transformer": "model", "train": "trainer", "RunResult": "trainer", "load_run": "runs",
    "read_metrics": "runs",
    "generate": "sampling", "stream_text": "sampling", "evaluate": "evaluation", "evaluate_text": "evaluation",
    "Tokenizer": "tokenizer", "get_tokenizer": "tokenizer", "train_bpe": "tokenizer", "prepare": "preparation",
    "from_hf": "hub", "to_hf": "hub", "plan": "planner", "Plan": "planner", "simulate": "simulator",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'nanomai' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nanomai.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
