"""Recurrent states in shared memory, which the threads of a process and other processes see and update in place."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from srm_core.arrays import numpy_to_torch
from srm_core.errors import ContractError
from srm_core.ops.common import Array

ALIGNMENT = 64  # bytes; a mapping begins at a page, so an offset that is a multiple of it is aligned
MAGIC = b"srmcache"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class CacheRows(NamedTuple):
    """The states of a batch as rows of a cache: sequence i has row slots[i] of every layer, and its position there.

    A decoder updates the rows in place. Rows that no two workers share need no lock.
    """

    cache: SharedCache
    slots: Tensor  # (B,) int64, distinct

    @property
    def positions(self) -> Tensor:
        """(B,) int64: how many positions each sequence has seen."""
        return self.cache.positions[self.slots]


class SharedCache:
    """Room for the recurrent states of N sequences, in one segment of shared memory.

    shapes: (N, H, D) of each layer, with one N. dtype: torch.float32 or torch.float64. name: of the segment; None: a
    new one. lock: also make `lock()` usable. Everything begins at 0.

    The process that creates a cache owns it: the segment's name goes when the cache is closed, leaves a `with` block,
    is collected, or when the process ends, whichever comes first. Those that attach only let go of it. Views that
    are still in use keep their memory, not the name.

    A cache can be sent to another process, which is then attached; `SharedCache.attach(name)` does the same in a
    process that has nothing to do with this one.

    >>> import torch
    >>> with SharedCache([(4, 2, 8)]) as cache:
    ...     with SharedCache.attach(cache.name) as other:
    ...         other.layers[0][3] = 1.0
    ...     cache.layers[0].sum((1, 2)).tolist()
    [0.0, 0.0, 0.0, 16.0]
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, *, name: str | None = None,
        lock: bool = False,
    ) -> None:  # fmt: skip
        checked = _check_shapes(shapes)
        if dtype not in DTYPES.values():
            raise ContractError("SharedCache", "dtype", f"{dtype}", "torch.float32 or torch.float64")
        layout = {"dtype": str(dtype).removeprefix("torch."), "shapes": checked, "lock": bool(lock)}
        header = MAGIC + len(text := json.dumps(layout).encode()).to_bytes(8, "little") + text
        self._open(_create(name, _offsets(layout, len(header))[-1]), layout, len(header), owned=True)
        # Whoever attaches finds the mark at the front only when everything behind it is there.
        buffer = cast(memoryview, self._segment.buf)
        try:
            buffer[len(MAGIC) : len(header)] = header[len(MAGIC) :]
            if lock and not _segment_path(self.name).exists():
                _lock_path(self.name).touch(0o600)
            buffer[: len(MAGIC)] = MAGIC
        except BaseException:
            self.close()
            raise

    @classmethod
    def attach(cls, name: str) -> SharedCache:
        """The cache of that name, which another process or this one has created and not closed.

        Errors: `ContractError` if there is none, or something else has that name.
        """
        _check_name(name)
        try:
            segment = _attach(name)
        except FileNotFoundError:
            raise ContractError(
                "SharedCache", "name", f"no shared memory called {name!r}", "the name of a cache that is open",
                "create it first, with SharedCache(..., name=...), and keep it open while others attach",
            ) from None  # fmt: skip
        except PermissionError:
            raise ContractError(
                "SharedCache", "name", f"{name!r}, which belongs to another user", "a cache of the same user"
            ) from None
        try:
            layout, header = _read_header(segment, name)
        except BaseException:
            segment.close()
            raise
        cache = cls.__new__(cls)
        cache._open(segment, layout, header, owned=False)
        return cache

    def _open(self, segment: _Segment, layout: dict[str, Any], header: int, owned: bool) -> None:
        self._segment, self._has_lock = segment, bool(layout["lock"])
        self.name, self.owned = segment.name, owned
        shapes = layout["shapes"]
        begin = _offsets(layout, header)
        self._arrays: tuple[Array, ...] | None = (
            _view(segment, "int64", [shapes[0][0]], begin[0]),
            *(_view(segment, layout["dtype"], s, at) for s, at in zip(shapes, begin[1:-1], strict=True)),
        )
        self._tensors = tuple(numpy_to_torch(a) for a in self._arrays)
        self._release = weakref.finalize(self, _release, segment, os.getpid() if owned else None)

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """A tensor (N, H, D) a layer, 64-byte aligned, over the shared memory."""
        self._views()
        return self._tensors[1:]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The same as NumPy arrays."""
        return self._views()[1:]

    @property
    def positions(self) -> Tensor:
        """(N,) int64: how many positions the sequence of each row has seen."""
        self._views()
        return self._tensors[0]

    def _views(self) -> tuple[Array, ...]:
        if self._arrays is None:
            raise ContractError(
                "SharedCache", self.name, "a cache that is closed", "an open one", "attach or create one"
            )
        return self._arrays

    def rows(self, slots: Any = None) -> CacheRows:
        """The rows `slots`, distinct integers, 0 <= slot < N, for a batch; None: all, in order.

        They keep what they hold: see `reset`. Errors: `ContractError`.
        """
        count = len(self.positions)
        if slots is None:
            return CacheRows(self, torch.arange(count))
        chosen = torch.as_tensor(slots)
        if chosen.numel() == 0:
            chosen = chosen.long()
        if chosen.ndim != 1 or chosen.dtype.is_floating_point or chosen.dtype == torch.bool:
            raise ContractError("SharedCache", "slots", f"{slots!r}"[:60], "a sequence of integers")
        rows = chosen.tolist()
        if len(set(rows)) != len(rows) or not all(0 <= r < count for r in rows):
            raise ContractError("SharedCache", "slots", f"{rows}"[:60], f"distinct integers, 0 to {count - 1}")
        return CacheRows(self, chosen.long())

    def reset(self, slots: Any = None) -> CacheRows:
        """The rows `slots`, set to 0: the state before the first token."""
        rows = self.rows(slots)
        for tensor in self._tensors:
            tensor[rows.slots] = 0
        return rows

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the cache's lock: one thread of one process at a time. It is not re-entrant.

        The kernel keeps it (flock on a file), so it works between any processes of the machine, and a holder that is
        killed lets go of it. Errors: `ContractError` if the cache was made without, or its name is gone.
        """
        import fcntl

        self._views()
        if not self._has_lock:
            raise ContractError("SharedCache", "lock", "a cache without one", "SharedCache(..., lock=True)")
        path = _segment_path(self.name)
        try:
            # A description of its own each time, for flock tells those apart, not threads or processes.
            file = os.open(path if path.exists() else _lock_path(self.name), os.O_RDWR)
        except FileNotFoundError:
            raise ContractError(
                "SharedCache", self.name, "a cache that its owner has closed", "one that is open"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a child forked meanwhile has the description, too; closing is not enough
            os.close(file)

    def close(self) -> None:
        """Let go of the memory; the owner also removes its name, so that nobody can attach. May be called again."""
        self._arrays, self._tensors = None, ()
        self._release()

    def __enter__(self) -> SharedCache:
        self._views()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[str], SharedCache], tuple[str]]:
        return SharedCache.attach, (self.name,)

    def __repr__(self) -> str:
        if self._arrays is None:
            return f"<SharedCache {self.name!r}, closed>"
        shapes = [a.shape for a in self._arrays[1:]]
        return f"<SharedCache {self.name!r}, {len(shapes)} layers, the first {shapes[:1]} {self._arrays[-1].dtype}>"


class _Segment(SharedMemory):
    """One that can be closed while views are in use: the memory then stays until `_sweep` finds them gone."""

    def close(self) -> None:
        with suppress(BufferError):
            super().close()


_closed: list[_Segment] = []  # whose views were still in use
_attaching = threading.Lock()


def _fresh_lock() -> None:
    global _attaching
    _attaching = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_lock)


def _sweep() -> None:
    """Close the segments whose views have gone meanwhile."""
    for segment in _closed[:]:
        with suppress(BufferError):
            SharedMemory.close(segment)
            with suppress(ValueError):  # another thread was faster
                _closed.remove(segment)


def _release(segment: _Segment, owner: int | None) -> None:
    # A forked child has the owner's finalizer, too, but is not the owner.
    if owner == os.getpid():
        with suppress(FileNotFoundError):
            segment.unlink()
        _lock_path(segment.name).unlink(missing_ok=True)
    _closed.append(segment)
    _sweep()


def _create(name: str | None, size: int) -> _Segment:
    _sweep()
    if name is not None:
        _check_name(name)
    try:
        return _Segment(name=name, create=True, size=size)
    except FileExistsError:
        raise ContractError(
            "SharedCache", "name", f"{name!r}, which is taken", "a new name",
            "SharedCache.attach(name) opens a cache that exists; after a crash, delete /dev/shm/NAME",
        ) from None  # fmt: skip
    except OSError as error:
        raise ContractError(
            "SharedCache", "shapes", f"{size:,} bytes, which cannot be had: {error.strerror}", "fewer or smaller rows",
            "see df /dev/shm",
        ) from None  # fmt: skip


def _attach(name: str) -> _Segment:
    """Without telling the resource tracker, which would remove the segment when this process ends."""
    if sys.version_info >= (3, 13):
        return _Segment(name=name, track=False)
    # Before 3.13 attaching registers. Taking that back is wrong in a child of the owner, which has the owner's
    # tracker: the owner's entry would go with it. So the registration of this one name is left out.
    with _attaching:
        register = resource_tracker.register

        def others(path: Any, kind: str) -> None:
            if kind != "shared_memory" or path.lstrip("/") != name:
                register(path, kind)

        resource_tracker.register = cast(Any, others)
        try:
            return _Segment(name=name)
        finally:
            resource_tracker.register = register


def _view(segment: SharedMemory, dtype: str, shape: list[int], at: int) -> Array:
    # Not np.ndarray(buffer=...), which lets the memory be unmapped while the array is in use.
    return np.frombuffer(cast(memoryview, segment.buf), dtype, math.prod(shape), at).reshape(shape)


def _segment_path(name: str) -> Path:
    """The segment as a file, where the system shows it as one (Linux)."""
    return Path("/dev/shm", name)


def _lock_path(name: str) -> Path:
    """The file to lock where the segment is none."""
    return Path(tempfile.gettempdir(), f"{name}.lock")


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or "/" in name or len(name) > 200:
        raise ContractError("SharedCache", "name", f"{name!r}"[:60], "up to 200 characters without a slash")


def _check_shapes(shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    checked = [[int(n) for n in shape] for shape in shapes]
    if not checked or any(len(s) != 3 or min(s) < 0 or s[0] != checked[0][0] for s in checked):
        raise ContractError(
            "SharedCache", "shapes", f"{checked}"[:80], "at least one (N, H, D), with the same N in all of them"
        )
    return checked


def _offsets(layout: dict[str, Any], header: int) -> list[int]:
    """Where the positions begin, then each layer, then the end; all multiples of ALIGNMENT."""
    sizes = [8 * layout["shapes"][0][0], *(np.dtype(layout["dtype"]).itemsize * math.prod(s) for s in layout["shapes"])]
    at = [-(-header // ALIGNMENT) * ALIGNMENT]
    for size in sizes:
        at.append(-(-(at[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return at


def _read_header(segment: SharedMemory, name: str) -> tuple[dict[str, Any], int]:
    """The layout, and the header's length. The segment may be anything at all."""
    start, data = len(MAGIC) + 8, cast(memoryview, segment.buf)
    try:
        if bytes(data[: len(MAGIC)]) != MAGIC:
            raise ValueError
        end = start + int.from_bytes(data[len(MAGIC) : start], "little")
        layout = json.loads(bytes(data[start:end]))
        layout["shapes"] = _check_shapes(layout["shapes"])
        if layout["dtype"] not in DTYPES or _offsets(layout, end)[-1] > segment.size:
            raise ValueError
        return layout, end
    except (ValueError, KeyError, TypeError):
        raise ContractError(
            "SharedCache", "name", f"{name!r}, which is no cache", "the name of a SharedCache",
            "if one is being created there, try again in a moment",
        ) from None  # fmt: skip
