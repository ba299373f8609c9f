"""Measured memory: storages saved for a backward pass, and the bytes in use at every operation."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Saved:
    """Counts the distinct storages that autograd saves inside the block, without those of module `apart`."""

    def __init__(self, apart: torch.nn.Module) -> None:
        self._apart = {t.untyped_storage().data_ptr() for t in (*apart.parameters(), *apart.buffers())}
        self._found: dict[int, tuple[int, torch.Tensor]] = {}  # tensors are kept, so that no address is reused

    def __enter__(self) -> "Saved":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._apart:
            self._found[storage.data_ptr()] = storage.nbytes(), tensor.detach()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self._found.values())


class Alive(TorchDispatchMode):
    """Tracks each storage that operations inside the block make: bytes in use `now`, and their maximum, `peak`.

    Sizes are read at every operation, because sharding resizes storages without an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, Any] = {}

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for reference in self._known.values() if (storage := reference()) is not None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in inputs:
                    key = id(storage)
                    self._known[key] = weakref.ref(storage, lambda _, key=key: self._known.pop(key, None))
        self.peak = max(self.peak, self.now)
        return found
