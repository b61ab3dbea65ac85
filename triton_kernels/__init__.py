"""Triton kernels, one a file. engine.py runs them, lens.py watches them, aot.py compiles them for absent GPUs.

Read engine.py, then rms_norm.py, which is the pattern of all the others.
"""

try:
    import triton
except ImportError as error:
    raise ImportError("triton_kernels needs Triton (Linux only): pip install 'triton>=3.6,<4'") from error

if triton.knobs.runtime.interpret:
    raise ImportError("unset TRITON_INTERPRET: the engine follows from where the tensors are, in one process")
