"""Executes notebooks anew: `python tools/execute.py [notebooks/01_bpe.py ...]`; with no name, all of them.

The .py half (jupytext's percent format) is what people edit. This runs it top to bottom in a fresh kernel and writes
the .ipynb half with its outputs, and with nothing that differs from run to run: the same code gives the same file.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
# JupyterLab then keeps the pair in step, and the .py half free of a header.
PAIR = {"formats": "ipynb,py:percent", "notebook_metadata_filter": "-all", "cell_metadata_filter": "tags,-all"}


def execute(half: Path) -> str | None:
    """Writes the .ipynb beside `half`; a cell that fails leaves the old file as it is, and is returned."""
    notebook = jupytext.read(half, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"  # jupytext draws a random one
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": half.parent}})
    try:
        client.execute()
    except CellExecutionError as error:
        return f"{half}: {error}"
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "jupytext": PAIR})  # nbclient had added versions
    nbformat.write(notebook, half.with_suffix(".ipynb"))
    return None


def main(names: list[str]) -> int:
    halves = [Path(name).with_suffix(".py") for name in names] or sorted(ROOT.glob("notebooks/*.py"))
    failed = 0
    with ProcessPoolExecutor(max_workers=2) as pool:
        for half, error in zip(halves, pool.map(execute, halves), strict=True):
            print(error or f"executed {half.with_suffix('.ipynb')}", flush=True)
            failed += error is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
