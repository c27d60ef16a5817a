"""Tensors that say they are on CUDA, and the rules of that device: which operators refuse what, and which make the host wait."""

from __future__ import annotations

import ctypes
import sys
import time
import traceback
import weakref
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, overrides
from torch.optim import optimizer
from torch.utils import _device, _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

import lit_eemllm
from lib.fake_cuda import kernels

aten = torch.ops.aten
_LIBRARY = torch.library.Library("aten", "IMPL")
CUDA = torch.device("cuda", 0)

WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.histc, aten.multinomial,
}  # fmt: skip
"""Operators whose result, or its shape, the host has to read. (`multinomial` checks its probabilities.)"""
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


current: World | None = None


class CudaTensor(Tensor):
    """On a device that is not there.

    Args:
        held: what it stands for, on the CPU, or on meta, without numbers.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        about = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=CUDA, **about)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: CudaTensor) -> None:
        Tensor.data.__set__(self, new)
        self.held = new.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of a World")

    # PyTorch reads and copies numbers below all that a World sees.
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return repr(self.cpu())

    def __format__(self, form: str) -> str:
        return format(self.cpu(), form)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})


def _default() -> torch.device:
    """That of `with torch.device(...)`. (PyTorch's own function makes a tensor to find out.)"""
    modes = [mode for mode in overrides._get_current_function_mode_stack() if isinstance(mode, _device.DeviceContext)]
    return modes[-1].device if modes else torch.device("cpu")


def sent(make: Any) -> Any:
    """A constructor of tensors from Python's numbers, made on the CPU and sent from there."""

    def made(*args: Any, **options: Any) -> Tensor:
        device, pinned = options.get("device") or _default(), options.pop("pin_memory", False)
        if torch.device(device).type == "cuda":
            return make(*args, **{**options, "device": "cpu"}).to(device)
        tensor = make(*args, **options)
        return tensor.pin_memory() if pinned else tensor

    return made


class Event:
    """A moment on the device, which is as far as the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Note(NamedTuple):
    """What the host waited for, or copied badly, and the line of the program that asked for it ("backward" in autograd)."""

    kind: str
    what: str
    where: str


class World(TorchDispatchMode):
    """In which CUDA is there.

    Args:
        numbers: tensors on it have numbers, not shapes alone.

    Attributes:
        notes: how often what was seen.
        launches: operators that reached the device, by name; views are none.
        traffic: bytes that these read and wrote there, each tensor once: by name.
        now, peak: bytes that tensors without numbers take on the device, and the most so far.
    """

    def __init__(self, numbers: bool = True) -> None:
        super().__init__()
        self.home = "cpu" if numbers else "meta"
        self.notes: Counter[Note] = Counter()
        self.launches: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()
        self.now = self.peak = self._inside = 0
        self._pinned: dict[int, Tensor] = {}
        self._seen: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and it would cost as much as all the rest

    def __enter__(self) -> World:
        global current
        current = self
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # else it writes into tensors of the CPU
        self._inside += 1
        torch.cuda.synchronize = lambda *device: self.note("wait", "synchronize")
        return super().__enter__()

    def __exit__(self, *about: Any) -> None:
        global current
        super().__exit__(*about)
        self._inside -= 1
        if not self._inside:
            current = None
            torch.__future__.set_overwrite_module_params_on_conversion(False)

    def forget(self) -> None:
        """What was noted and launched so far."""
        self.notes.clear()
        self.launches.clear()
        self.traffic.clear()

    def note(self, kind: str, what: object = "") -> None:
        self.notes[Note(kind, str(what), _line())] += 1

    def wrap(self, held: Tensor) -> CudaTensor:
        if held.is_meta:
            self._count(held.untyped_storage())
        return CudaTensor(held)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // 512) * 512  # as the allocator rounds
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone).atexit = False

    # --- every operator
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_composite(func):  # comes here in inference mode, without autograd which takes it apart
            with self:
                return func.decompose(*args, **kwargs)
        leaves = _tensors([*args, *kwargs.values()])
        on = [x for x in leaves if isinstance(x, CudaTensor)]
        named, packet = kwargs.get("device"), func.overloadpacket
        named = None if named is None else torch.device(named)
        if not on and (named is None or named.type != "cuda"):
            return self._on_cpu(func, packet, args, kwargs)
        if packet in (aten._to_copy, aten.copy_):
            return self._copy(func, packet, args, kwargs, named)
        if on:
            self._refuse_mixing(func, packet, leaves, args)
        self._wait(func, packet, args, kwargs)
        launch = None if func.is_view or packet is aten._fused_sdp_choice else func.__name__
        if launch is not None:
            launch = launch if func.namespace == "aten" else str(func)
            self.launches[launch] += 1
        kernel = kernels.KERNELS.get(packet) if self.home == "cpu" else None
        args, kwargs = _mapped(_held, args), {name: _mapped(_held, x) for name, x in kwargs.items()}
        if packet is aten._fused_sdp_choice:
            return kernels.choice(*args, **kwargs)
        kernels.check(packet, func, args, kwargs)
        if named is not None:
            kwargs["device"] = self.home if named.type == "cuda" else named
        if self.home == "meta" and packet in WAITS:
            return self._unknown(packet, args)
        found = kernel(func, *args, **kwargs) if kernel is not None else func(*args, **kwargs)
        if launch is not None:
            read = [*on[1:], found] if packet is aten.index_select else on  # of its source no row but those
            self.traffic[launch] += sum(x.nbytes for x in (*read, *_tensors([found])))
        if func._schema.is_mutable:
            return self._changed(func, on, leaves, found)
        if named is not None and named.type == "cpu":
            return found
        if func.is_view and torch.is_inference_mode_enabled() and not on[0].is_inference():
            with torch.inference_mode(False):  # a view of an ordinary tensor is one
                return self._views(found, on[0])
        return self._views(found, on[0]) if func.is_view else self._wrapped(found)

    def _views(self, found: Any, of: CudaTensor) -> Any:
        """They share a storage, as a view does with what it is of."""
        views = self._wrapped(found)
        for view in _tensors([views]):
            torch._functionalize_unsafe_set(view, of)
        return views

    def _wrapped(self, found: Any) -> Any:
        return _mapped(self.wrap, found)

    def _on_cpu(self, func: Any, packet: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if packet is aten._pin_memory:
            pinned = args[0].clone()
            self._pinned[pinned.untyped_storage()._cdata] = pinned  # kept: another could get its address
            return pinned
        if packet is aten.empty and kwargs.get("pin_memory"):
            return self._on_cpu(
                aten._pin_memory, aten._pin_memory, [func(*args, **{**kwargs, "pin_memory": False})], {}
            )
        if packet is aten.is_pinned:
            return self._is_pinned(args[0])
        return func(*args, **kwargs)

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _changed(self, func: Any, on: list[CudaTensor], leaves: list[Any], found: Any) -> Any:
        """What an operator that writes into its arguments gives: these. Their shape must not have changed."""
        for tensor in on:
            assert (tensor.shape, tensor.stride()) == (tensor.held.shape, tensor.held.stride()), (
                f"{func} is not known here"
            )
        own = {id(tensor.held): tensor for tensor in on}
        return _mapped(lambda x: own[id(x)] if id(x) in own else self.wrap(x), found)

    def _unknown(self, packet: Any, args: Any) -> Any:
        """What is read of a tensor without numbers."""
        assert packet is aten._local_scalar_dense, f"{packet} of tensors without numbers"
        return {torch.bool: False}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)

    # --- copies
    def _copy(self, func: Any, packet: Any, args: Any, kwargs: dict[str, Any], named: torch.device | None) -> Any:
        """Between devices, and on CUDA from type to type."""
        source = args[0] if packet is aten._to_copy else args[1]
        into = args[0] if packet is aten.copy_ else None
        to_cuda = isinstance(into, CudaTensor) if into is not None else (named is None or named.type == "cuda")
        hurry = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
        if isinstance(source, CudaTensor) and to_cuda:
            self.launches[func.__name__] += 1
            width = (into.dtype if into is not None else kwargs.get("dtype") or source.dtype).itemsize
            self.traffic[func.__name__] += source.nbytes + source.numel() * width
        elif to_cuda and source.numel():
            self.launches["copy to device"] += 1
            if not self._is_pinned(source):
                self.note("unpinned copy", f"{source.dtype} {tuple(source.shape)}")
            elif not hurry:
                self.note("blocking copy", f"{source.dtype} {tuple(source.shape)}")
        elif source.numel():
            self.launches["copy to host"] += 1
            if not (hurry and into is not None and self._is_pinned(into)):
                self.note("wait", f"copy to host of {source.dtype} {tuple(source.shape)}")
        held = source.held if isinstance(source, CudaTensor) else source
        if into is not None:
            target = into.held if isinstance(into, CudaTensor) else into
            func(target, torch.zeros_like(held, device=target.device) if held.is_meta != target.is_meta else held)
            return into
        if "device" in kwargs:
            kwargs["device"] = self.home if to_cuda else named
        if held.is_meta and not to_cuda:
            held, kwargs = torch.zeros_like(held, device="cpu"), {**kwargs, "dtype": kwargs.get("dtype", held.dtype)}
        kwargs.pop("non_blocking", None)
        kwargs.pop("pin_memory", None)
        found = func(held, **kwargs)
        return self.wrap(found) if to_cuda else found

    # --- what CUDA refuses
    def _refuse_mixing(self, func: Any, packet: Any, leaves: list[Any], args: Any) -> None:
        """Tensors of the CPU beside those of CUDA: but for numbers where an operator goes element by element, and for indices."""
        for x in leaves:
            if not isinstance(x, Tensor) or isinstance(x, CudaTensor):
                continue
            if packet in INDEXED and isinstance(args[0], CudaTensor):
                self.note(
                    "unpinned copy", f"{func} copies an index or a value to the device, {x.dtype} {tuple(x.shape)}"
                )
            elif x.dim() or (torch.Tag.pointwise not in func.tags and packet not in (aten.fill, aten.fill_)):
                text = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
                raise RuntimeError(f"{text} ({func}, {x.dtype} {tuple(x.shape)} on the CPU)")

    # --- what makes the host wait
    def _wait(self, func: Any, packet: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if packet in WAITS:
            self.note("wait", func)
        elif packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            self.note("wait", f"{func} without output_size")
        elif packet in INDEXED:
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices if isinstance(x, CudaTensor)):
                self.note("wait", f"{func} by a mask")


@cache
def _is_composite(func: Any) -> bool:
    composite, own = (
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
        for key in ("CompositeImplicitAutograd", "CUDA")
    )
    return composite and not own


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += _tensors(x)
    return found


def _mapped(function: Any, value: Any) -> Any:
    """With a function of all tensors in it."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(function, x) for x in value) if isinstance(value, list | tuple) else value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, CudaTensor) else tensor


def _line() -> str:
    """The line of the program that is running; of another library, or of a test, if there is none."""
    frames = [f for f in reversed(traceback.extract_stack()) if "/tests/lib/fake_cuda/" not in f.filename]
    frames = [f for f in frames if "/site-packages/torch/" not in f.filename]
    for part in (f"{Path(lit_eemllm.__file__).parent}/", "/site-packages/", "/tests/gpu_path/"):
        for frame in frames:
            if part in frame.filename:
                file = frame.filename.rpartition(part)[2]
                return f"{Path(part).name}/{file}:{frame.lineno} {(frame.line or '').strip()[:100]}"
    return "backward"


def begin(library: str) -> None:
    """Give this process the device."""
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    sys.modules["bitsandbytes"] = None  # peft imports it where it is, and it wants a real device
    _device._device_constructors()  # PyTorch remembers which they are, and must not take ours for them
    torch.tensor, torch.as_tensor = sent(torch.tensor), sent(torch.as_tensor)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.is_bf16_supported = lambda *args, **options: True
    torch.cuda.get_device_name = lambda *device: "fake"
    torch.cuda.Event = Event
    torch.cuda.reset_peak_memory_stats = torch.cuda.empty_cache = lambda *device: None
    torch.cuda.max_memory_allocated = lambda *device: current.peak if current is not None else 0
    torch.cuda.memory_allocated = lambda *device: current.now if current is not None else 0
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # `Module.to` would else write into tensors of the CPU
    for name in (
        "silu_backward",
        "mish_backward",
        "_fused_rms_norm",
    ):  # have kernels on CUDA, and would be taken apart without
        _LIBRARY.impl(name, lambda *args: None, "CUDA")  # a World never asks for it
    for module in (_foreach_utils, optimizer):
        module._foreach_supported_types.append(CudaTensor)
