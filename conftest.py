"""For notebooks: those on kernels need Triton, which has wheels for Linux on x86-64 only."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["notebooks/11*.ipynb"]
