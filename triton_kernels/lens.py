"""The lens: watch every load and store of a kernel on the CPU.

    with Trace(x=x, y=y, shuffle=0) as t:
        kernel[grid](x, y, ...)
    t.loads["x"], t.stores["y"]      # bytes that crossed between programs and memory
    t.owners("y"), t.reads("x")      # per element: which program wrote it, how often it was read
    t.draw("y")                      # the same as a picture

While it is open, each access is checked: it must stay inside the tensor that its pointer came from (`OutOfBounds`),
and no program may touch what another program of the same launch writes (`Race`): programs of a launch run in any
order, at the same time. `shuffle=seed` runs them in a random order, so that a hidden dependence shows in the numbers.

Tensors that the caller does not name get the name of the kernel's parameter. A view counts as its own elements,
strides and all, whatever its dtype; two names for one element are refused. Bytes are those of the active lanes: what a
cache of the GPU serves again is counted again. Not seen: races between threads inside one program.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
from torch import Tensor

from triton_kernels.engine import KernelError, observing

NOBODY, MANY = -1, -2
# What a program may not do to an element after another program did one of these to it, in the same launch.
CONFLICTS = {"read": ("write", "atomic"), "write": ("read", "write", "atomic"), "atomic": ("read", "write")}


class OutOfBounds(KernelError):
    """An active lane reached outside the tensor."""


class Race(KernelError):
    """Two programs of one launch touch an element, and at least one writes it: the GPU may run them in any order."""


class _Elements:
    """Where the elements of a tensor lie in memory. A dimension with stride 0 holds one element, however long it is."""

    def __init__(self, name: str, tensor: Tensor):
        dimensions = list(zip(tensor.shape, tensor.stride(), strict=True))
        self.shape = tuple(n if stride or not n else 1 for n, stride in dimensions)
        self.size = tensor.element_size()
        offsets = np.zeros((), np.int64)
        for n, stride in zip(self.shape, tensor.stride(), strict=True):
            offsets = offsets[..., None] + np.arange(n) * stride
        addresses = tensor.data_ptr() + self.size * offsets.ravel()
        self.order = np.argsort(addresses, kind="stable")
        self.sorted = addresses[self.order]
        if (np.diff(self.sorted) == 0).any():
            raise ValueError(f"{name}: its strides {tensor.stride()} put two elements at one address")

    def find(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(addresses, elements of each): the indices of those that hold `size` bytes there; -1 where there is none.

        One element, or several where the access is wider: four of uint8 for a load through a view as int32.
        """
        part = min(size, self.size)
        addresses = addresses[:, None] + np.arange(0, size, part)
        if not self.sorted.size:
            return np.full(addresses.shape, -1)
        slot = np.searchsorted(self.sorted, addresses, side="right") - 1
        inside = (slot >= 0) & (addresses + part <= self.sorted[slot] + self.size)
        return np.where(inside, self.order[slot], -1)


class _Watched:
    """What happened to one tensor. It is kept alive, so that no other tensor gets its memory."""

    def __init__(self, name: str, tensor: Tensor):
        self.tensor, self.elements = tensor, _Elements(name, tensor)
        count = self.elements.sorted.size
        self.owners = np.full(count, NOBODY, np.int32)
        self.reads = np.zeros(count, np.int32)
        self.begin()

    def begin(self) -> None:
        """A new launch: it begins when the last is over, so nothing that was touched before can race."""
        self.seen = {kind: np.full(self.owners.shape, NOBODY, np.int32) for kind in CONFLICTS}

    def shaped(self, values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values.reshape(self.elements.shape), tuple(self.tensor.shape))


class Trace:
    """Watches all interpreted launches of this process while it is open. See the top of the file.

    Tensors by name; `shuffle`: a seed, None keeps the order; `races=False` for kernels that take turns by a lock.
    """

    def __init__(self, *, shuffle: int | None = None, races: bool = True, **named: Tensor):
        self.random = None if shuffle is None else random.Random(shuffle)
        self.races, self.launches = races, 0
        self.loads: dict[str, int] = {}
        self.stores: dict[str, int] = {}
        self._watched: dict[str, _Watched] = {}
        for name, tensor in named.items():
            self._watch(name, tensor)

    def __enter__(self) -> Trace:
        opened = contextlib.ExitStack()
        opened.enter_context(observing(self))
        self._open = opened  # only now: a trace that is open already keeps its own
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    # --- what it saw

    def owners(self, name: str) -> np.ndarray:
        """In the tensor's shape: the number x + X (y + Y z) of the program that wrote each element last; -1 nobody."""
        return self._of(name).shaped(self._of(name).owners)

    def reads(self, name: str) -> np.ndarray:
        """In the tensor's shape: how often each element was read."""
        return self._of(name).shaped(self._of(name).reads)

    def __str__(self) -> str:
        lines = [f"{'tensor':16}{'shape':>20}{'bytes read':>16}{'bytes written':>16}"]
        for name, w in self._watched.items():
            whole = max(1, w.tensor.numel() * w.tensor.element_size())
            moved = (f"{count} ({count / whole:.2f}x)" for count in (self.loads[name], self.stores[name]))
            lines.append(f"{name:16}{tuple(w.tensor.shape)!s:>20}" + "".join(f"{m:>16}" for m in moved))
        return "\n".join(lines)

    def draw(self, name: str, what: str | None = None, ax: Any = None) -> Any:
        """Draws the tensor's elements, rows over columns: `what` = "owners" or "reads". Returns the matplotlib axes.

        Without `what`: owners where the tensor was written, reads elsewhere. Leading dimensions are laid under one
        another. Up to 16 x 16 elements carry their number.
        """
        import matplotlib.pyplot as plt  # late: tests and training that trace need no plots
        from matplotlib.ticker import MaxNLocator

        what = what or ("owners" if (self.owners(name) != NOBODY).any() else "reads")
        grid = {"owners": self.owners, "reads": self.reads}[what](name)
        grid = grid.reshape(-1, grid.shape[-1] if grid.ndim else 1)
        ax = ax or plt.subplots(figsize=(6, 4))[1]
        shades = "tab20" if what == "owners" else "viridis"
        image = ax.imshow(np.ma.masked_equal(grid, NOBODY), cmap=shades, aspect="auto", interpolation="nearest", vmin=0)
        if max(grid.shape) <= 16:
            for (row, column), value in np.ndenumerate(grid):
                ax.text(column, row, "-" if value == NOBODY else value, ha="center", va="center", fontsize=8,
                        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1})
        label = "program that wrote it" if what == "owners" else "times read"
        ax.figure.colorbar(image, ax=ax, label=label, ticks=MaxNLocator(integer=True))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(False)
        ax.set(xlabel="column", ylabel="row", title=f"{name} {tuple(self._of(name).tensor.shape)}: {label}")
        return ax

    def _of(self, name: str) -> _Watched:
        if name not in self._watched:
            raise KeyError(f"no tensor {name!r} in this trace; there are {', '.join(self._watched) or 'none'}")
        return self._watched[name]

    # --- what the engine tells it

    def launch(self, kernel: str, tensors: dict[str, Tensor], grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """A launch begins: meet its tensors, choose the order of its programs."""
        self.kernel, self.grid, self.launches = kernel, grid, self.launches + 1
        self._arguments = {parameter: self._meet(parameter, tensor) for parameter, tensor in tensors.items()}
        for watched in self._watched.values():
            watched.begin()
        programs = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        if self.random is not None:
            self.random.shuffle(programs)
        return programs

    def program(self, index: tuple[int, int, int]) -> None:
        """The program (x, y, z) begins."""
        self.index = index
        self.number = index[0] + self.grid[0] * (index[1] + self.grid[1] * index[2])

    def access(self, kind: str, addresses: np.ndarray, size: int, parameter: str | None) -> None:
        """Counts and checks one access of the running program."""
        addresses = addresses.astype(np.int64)
        if parameter is None:  # a pointer that was computed in a way that lost its origin, or came from a descriptor
            candidates = [(name, watched.elements) for name, watched in self._watched.items()]
        else:
            candidates = [self._arguments[parameter]]
        for name, legal in candidates:
            inside = (legal.find(addresses, size) >= 0).all(1)
            if inside.any():
                self._touch(kind, name, addresses[inside], size)
            addresses = addresses[~inside]
        if addresses.size:
            where = "any tensor" if parameter is None else self._called(parameter)
            self._fail(OutOfBounds, f"{kind} of {addresses.size} elements outside {where}; is a mask missing?")

    def _called(self, parameter: str) -> str:
        name, legal = self._arguments[parameter]
        start = "" if name == parameter else f"{parameter} = "
        return f"{start}{name}, which has {legal.sorted.size}"

    def _touch(self, kind: str, name: str, addresses: np.ndarray, size: int) -> None:
        watched = self._watched[name]
        elements = watched.elements.find(addresses, size).ravel()
        if self.races:
            self._check_races(kind, name, watched, elements)
        if kind in ("read", "atomic"):
            self.loads[name] += size * addresses.size
            np.add.at(watched.reads, elements, 1)
        if kind in ("write", "atomic"):
            self.stores[name] += size * addresses.size
            watched.owners[elements] = self.number

    def _check_races(self, kind: str, name: str, watched: _Watched, elements: np.ndarray) -> None:
        for earlier in CONFLICTS[kind]:
            others = watched.seen[earlier][elements]
            bad = np.flatnonzero((others != NOBODY) & (others != self.number))
            if bad.size:
                at = tuple(int(i) for i in np.unravel_index(elements[bad[0]], watched.elements.shape))
                who = "several programs" if others[bad[0]] == MANY else f"program number {others[bad[0]]}"
                self._fail(Race, f"{kind} of {name}{list(at)} after a {earlier} of it by {who}, in one launch")
        seen = watched.seen[kind]
        seen[elements] = np.where((seen[elements] == NOBODY) | (seen[elements] == self.number), self.number, MANY)

    def _fail(self, error: type[KernelError], message: str) -> None:
        raise error(f"{self.kernel}, program {self.index}: {message}")

    # --- tensors

    def _meet(self, parameter: str, tensor: Tensor) -> tuple[str, _Elements]:
        """The name under which an argument is counted, and the elements that it may reach."""
        legal = _Elements(parameter, tensor)
        for name, watched in self._watched.items():
            found = watched.elements.find(legal.sorted, legal.size) >= 0
            if found.size and found.all():
                return name, legal
        name, again = parameter, 2
        while name in self._watched:
            name, again = f"{parameter}_{again}", again + 1
        self._watch(name, tensor)
        return name, legal

    def _watch(self, name: str, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: a Trace watches the CPU only")
        new = _Watched(name, tensor)
        for other, watched in self._watched.items():
            if (watched.elements.find(new.elements.sorted, 1) >= 0).any():
                raise ValueError(f"{name} and {other} share memory: name the larger of the two, and only it")
        self._watched[name], self.loads[name], self.stores[name] = new, 0, 0
