"""Whether a logits processor or stopping criterion keeps a state: a deep, structural snapshot of any Python object.

Two snapshots are equal when nothing was changed in between: no attribute, no item of a container, no element of a
tensor or array, no variable of a closure, a generator or a module that its functions name. What cannot be looked into
(locks, objects of extension modules that cannot be pickled) counts by its type alone.
"""

from __future__ import annotations

import functools
import itertools
import logging
import random
import sys
from collections import deque
from collections.abc import Iterable
from enum import Enum
from types import BuiltinFunctionType, CellType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

LIMIT = 20_000  # objects that are looked at, those near the surface first
LARGEST = 1 << 16  # elements of a tensor that are all looked at; of larger ones every so-and-so-many-th
LEAVES = (type(None), bool, int, str, bytes)
BY_NAME = (float, complex, type, ModuleType, BuiltinFunctionType, Enum, logging.Logger, torch.dtype, torch.device)
# Their classes and functions keep no state of a user's; their objects may.
LIBRARIES = sys.stdlib_module_names | {"torch", "transformers", "tokenizers", "numpy"}
UNREADABLE = "tokenizers"  # pickling them takes long, and they keep nothing

Snapshot = list[tuple[Any, ...]]


def snapshot(thing: Any) -> Snapshot:
    """What `thing` holds at any depth, as plain values that can be compared with those of another moment."""
    order: dict[int, int] = {}
    alive: list[Any] = []  # an id belongs to one object as long as that is alive
    waiting: deque[Any] = deque()

    def mark(value: Any) -> Any:
        if isinstance(value, LEAVES) and type(value) in LEAVES:
            return value
        if isinstance(value, BY_NAME):
            return type(value).__name__, repr(value)
        if id(value) not in order:
            if len(order) >= LIMIT:
                return "beyond the limit"
            order[id(value)] = len(order)
            alive.append(value)
            waiting.append(value)
        return "object", order[id(value)]

    mark(thing)
    found: Snapshot = []
    while waiting:
        value = waiting.popleft()
        found.append((type(value).__qualname__, *(mark(part) for part in parts(value))))
    return found


def parts(value: Any) -> list[Any]:
    """What this object is made of, one level down."""
    if isinstance(value, torch.Tensor):
        return [digest(value)]
    if isinstance(value, np.ndarray):
        some = value.reshape(-1) if value.size <= LARGEST else value.flat[:: value.size // LARGEST]
        return [str(value.dtype), str(value.shape), some.tolist() if value.dtype == object else some.tobytes()]
    if isinstance(value, torch.Generator):
        return [digest(value.get_state())]
    if isinstance(value, random.Random):
        return [value.getstate()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        return of_function(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords, vars(value)]
    if isinstance(value, CellType):
        return attributes(value, ["cell_contents"])
    if isinstance(value, GeneratorType):
        frame = value.gi_frame
        return [] if frame is None else [frame.f_lasti, *frame.f_locals.values()]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, classmethod | staticmethod):
        return [value.__func__]
    return of_object(value)


def of_function(function: FunctionType) -> list[Any]:
    """Its defaults, closure and own attributes, and the globals that it names."""
    held = [function.__defaults__, function.__kwdefaults__, function.__closure__, vars(function) or None]
    if library(function):
        return held
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    return held + [function.__globals__[name] for name in names]


def of_object(value: Any) -> list[Any]:
    """Items, attributes and slots, and what its classes hold where they are a user's."""
    held: list[Any] = []
    if isinstance(value, dict):
        held += itertools.chain.from_iterable(dict.items(value))
    elif isinstance(value, list | tuple | deque):
        held += value
    elif isinstance(value, set | frozenset):
        plain = all(type(item) in LEAVES for item in value)
        held += sorted(map(repr, value)) if plain else value
    elif not hasattr(value, "__dict__"):
        held += reduced(value)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        held += attributes(value, [slots] if isinstance(slots, str) else slots)
        if not library(kind):
            held += [each for name, each in vars(kind).items() if not name.startswith("__") or name == "__call__"]
    return held + attributes(value, ["__dict__"])


def reduced(value: Any) -> list[Any]:
    """What pickle would keep of an object that shows no attributes, such as an iterator."""
    if type(value).__module__.partition(".")[0] == UNREADABLE:
        return []
    try:
        return [value.__reduce_ex__(4)]
    except Exception:  # whatever an extension module raises
        told = repr(value)
        return [] if " at 0x" in told else [told]


def attributes(value: Any, names: Iterable[str]) -> list[Any]:
    held = []
    for name in names:
        try:
            held.append(getattr(value, name))
        except Exception:  # an empty cell, an unset slot, a property that fails
            continue
    return held


def library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


def digest(tensor: torch.Tensor) -> str:
    """Shape, type and elements; of a large tensor a sample of them and the count of its changes in place."""
    told = f"{tuple(tensor.shape)} {tensor.dtype}"
    try:
        flat = tensor.detach().reshape(-1)
        if flat.numel() > LARGEST:
            flat = flat[:: flat.numel() // LARGEST]
            told += " inference" if tensor.is_inference() else f" version {tensor._version}"
        return f"{told} {hash(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())}" if flat.numel() else told
    except (RuntimeError, NotImplementedError, TypeError):  # meta, sparse and quantised tensors
        return told
