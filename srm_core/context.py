"""The launch context: what a kernel is given beside its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from srm_core.arrays import LIBRARIES, host_device
from srm_core.config import State


class Residuals:
    """What a backward sees of its forward: `args`, `options`, and by name the tensors that were kept (or None).

    A gradient that nobody `wants` need not be computed: the backward may return None for it.
    """

    __slots__ = ("args", "kept", "options", "wanted")

    def __init__(
        self, args: tuple[Any, ...], options: dict[str, Any], kept: dict[str, Any],
        wanted: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        self.args, self.options, self.kept, self.wanted = args, options, kept, wanted

    def wants(self, name: str) -> bool:
        """Is the gradient of the argument `name` wanted?"""
        return self.wanted is None or name in self.wanted

    def get(self, name: str) -> Any:
        """The residual `name`, or None if the forward left it empty."""
        return self.kept.get(name)


class LaunchContext:
    """Allocation in the caller's library, the current stream, the policy, and whether residuals are wanted.

    array_library, device: of the arrays that the kernel sees. precision: "ieee" or "tf32". deterministic: bool.
    wants_residuals: True if a backward will follow; then `keep` stores what it may use.
    memo: a dict of the kernel's own, for what it has worked out for this kind of call: the next calls whose arrays have
    the same types, shapes, dtypes and device, and whose static options are the same, find it again. Strides, alignment
    and values are not part of the kind.
    """

    __slots__ = ("_kept", "_library", "array_library", "deterministic", "device", "memo", "precision")

    def __init__(
        self, library: str, device: Any, state: State, kept: dict[str, Any] | None = None,
        memo: dict[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        self.array_library = library
        self.device = device
        self.precision = state.precision
        self.deterministic = state.deterministic
        self._library = LIBRARIES[library]
        self._kept = kept
        self.memo: dict[Any, Any] = {} if memo is None else memo

    @property
    def wants_residuals(self) -> bool:
        return self._kept is not None

    @property
    def stream(self) -> int | None:
        """The handle of the caller's current stream, read at each access; None on a CPU."""
        return self._library.stream(self.device)

    def keep(self, name: str, array: Any) -> None:
        """Store a residual of the operator's spec for the backward; ignored if no backward will follow."""
        if self._kept is not None:
            self._kept[name] = array

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An uninitialised array for an output, from the caller's library and allocator.

        dtype: a name ("float32", "bfloat16") or a dtype of the kernel's library.
        """
        return self._library.empty(shape, dtype, self.device)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._library.zeros(shape, dtype, self.device)

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Memory for the kernel's own use, which no caller will see."""
        return self._library.empty(shape, dtype, self.device)


class ForeignContext(LaunchContext):
    """For a kernel whose library is not the caller's: memory comes from the caller's library as a view.

    `to_caller` finds the caller's own array again, so that a result is what the caller's allocator made.
    """

    __slots__ = ("_back", "_caller", "_caller_device", "_made", "_view")

    def __init__(
        self, library: str, caller: str, device: Any, state: State,
        view: Callable[[Any], Any], back: Callable[[Any], Any], kept: dict[str, Any] | None = None,
        memo: dict[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(library, host_device(library), state, kept, memo)  # views exist in host memory only
        self._caller, self._caller_device = LIBRARIES[caller], device
        self._view, self._back = view, back
        self._made: dict[int, tuple[Any, Any]] = {}

    def _lend(self, array: Any) -> Any:
        view = self._view(array)
        self._made[id(view)] = (view, array)
        return view

    def _name(self, dtype: Any) -> str:
        return dtype if isinstance(dtype, str) else self._library.dtype_name(dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._lend(self._caller.empty(shape, self._name(dtype), self._caller_device))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._lend(self._caller.zeros(shape, self._name(dtype), self._caller_device))

    def to_caller(self, array: Any) -> Any:
        made = self._made.get(id(array))
        return made[1] if made is not None else self._back(array)
