"""For notebooks: those on kernels need Triton, which has wheels for Linux on x86-64 only; and a kernel speaks through
files. Through ports it may lose the ones that it was given to another process before it listens there."""

import importlib.util
import os
import tempfile

import nbval.kernel

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["notebooks/11*.ipynb"]


class KernelManager(nbval.kernel.KernelManager):
    """A kernel with sockets in a new directory, whose name is short: a socket's path has about 100 characters."""

    def __init__(self, **options):
        self.sockets = tempfile.TemporaryDirectory(prefix="kernel-")
        super().__init__(transport="ipc", ip=os.path.join(self.sockets.name, "socket"), **options)


nbval.kernel.KernelManager = KernelManager
