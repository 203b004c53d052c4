"""Counts the bytes of live tensors and their peak: the exact memory of a model, its cache and its activations.

A process's resident memory varies by megabytes (allocator, libraries, interpreter), more than a small model takes; the
bytes of live tensors do not. Every operation of the thread is observed at dispatch, composite operations in their
parts. A storage counts once, however many views it has, from the operation that created or first used it until it is
freed. Memory that kernels allocate below the dispatcher is not counted.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.models.structure.replacements import sparse


class LiveTensors(TorchDispatchMode):
    """Counts while entered: `bytes` is the size of all live tensors, `peak_bytes` its maximum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def hold(self, model: nn.Module) -> None:
        """Count a model's parameters and buffers, which may have been created without an observed operation."""
        self._count([*model.parameters(), *model.buffers()])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count its inputs and outputs."""
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            self._count(tree_leaves((args, kwargs)))
            result = func(*args, **kwargs)
            self._count(tree_leaves(result))
        return result

    def _count(self, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor) and not value.is_meta:
                for part in _plain(value):
                    self._add(part)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.layout == torch.strided:
            owner: Any = tensor.untyped_storage()
            key, size = owner._cdata, owner.nbytes()
        else:  # packed by a library: its storage is not accessible
            owner, key, size = tensor, id(tensor), tensor.numel() * tensor.element_size()
        if key not in self._sizes:
            self._references[key] = weakref.ref(owner, partial(self._free, key))
        self.bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _free(self, key: int, _: object) -> None:
        self.bytes -= self._sizes.pop(key)
        del self._references[key]


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that make up a tensor."""
    if sparse.is_dense(tensor):
        return [tensor]
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [part for value in inner for part in _plain(value)]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return list(sparse.parts(tensor).values()) if tensor.layout in (torch.sparse_csr, torch.sparse_bsr) else [tensor]
