"""Weights and tokenizers to and from the folders of `transformers`: families, settings, vocabulary, folders."""

from nanomai.hub.families import HubError
from nanomai.hub.folders import from_hf, import_run, read_model, to_hf

__all__ = ["HubError", "from_hf", "import_run", "read_model", "to_hf"]
