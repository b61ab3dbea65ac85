"""Weights and tokenizers to and from the folders of `transformers`: families, settings, vocabulary, source, folders."""

from nanomai.hub.families import HubError
from nanomai.hub.folders import from_hf, import_run, read_model, to_hf
from nanomai.hub.settings import caution

__all__ = ["HubError", "caution", "from_hf", "import_run", "read_model", "to_hf"]
