"""A pretended GPU: the storages that code puts on "cuda" are ordinary memory, marked. Every operation then runs, with real
numbers and real control flow, and an operation that mixes marked and unmarked tensors fails as it would on a GPU. Matrix
products of marked tensors are noted with the dtype of their operands.

What it does not know: CUDA's own kernels and their numbers, streams, memory, and autocast's list for CUDA, for which the
CPU's stands in."""

import contextlib
import functools
import sys

import torch
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
CROSSES = {aten.copy_.default, aten._to_copy.default}  # between devices
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "randint", "from_numpy", "linspace"}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._scaled_dot_product_flash_attention_for_cpu}


class Marks:
    """Which storages are on the GPU. Weak references keep an address from being given to another storage. What torch makes
    out of nothing by itself, say in a backward, is of no device until it meets a tensor that is."""

    def __init__(self):
        self.gpu, self.open, self.pinned = {}, {}, {}
        self.asked = False  # whether Python asked for the tensor that is made now

    def add(self, tensor, to=None):
        storage = tensor.untyped_storage()
        (self.gpu if to is None else to)[storage._cdata] = StorageWeakRef(storage)

    def __contains__(self, tensor):
        return tensor.untyped_storage()._cdata in self.gpu

    def claim(self, tensor):
        """Whether the tensor is on the GPU, or now is."""
        if self.open.pop(tensor.untyped_storage()._cdata, None):
            self.add(tensor)
        return tensor in self


class Operations(TorchDispatchMode):
    """Below autograd: checks devices, marks what comes out, notes products."""

    def __init__(self, marks):
        super().__init__()
        self.marks, self.products = marks, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if "meta" in (str(kwargs.get("device")), *(t.device.type for t in tensors)):  # how transformers builds a model
            return func(*args, **kwargs)
        on_gpu = any(t in self.marks for t in tensors)
        if kwargs.get("device") is not None:
            on_gpu = on_gpu or torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        elif on_gpu and func not in CROSSES:
            # a tensor without dimensions is a number to most operations, and indices may wait on the CPU for a GPU's tensor
            asked = [args[0], *args[2:]] if func in INDEXES and args[0] in self.marks else (args, kwargs)
            strangers = [t for t in tree_leaves(asked) if isinstance(t, torch.Tensor) and t.ndim and not self.marks.claim(t)]
            if strangers:
                raise RuntimeError(f"{func}: tensors on cuda and on the CPU, {[tuple(t.shape) for t in strangers]}")
        kwargs.pop("pin_memory", None)
        packet = func.overloadpacket
        if on_gpu and packet in PRODUCTS:
            caller = sys._getframe(1)
            names = set()
            while caller and len(names) < 40:
                names.add(caller.f_code.co_name)
                caller = caller.f_back
            self.products.append((str(packet), {t.dtype for t in tensors}, [tuple(t.shape) for t in tensors], names))
        if "out_dtype" in kwargs or packet in (aten.mm, aten.addmm) and any(isinstance(a, torch.dtype) for a in args):
            return self.widened(packet, args, kwargs)
        out = func(*args, **kwargs)
        if func is aten.copy_.default:
            return out  # its first argument, wherever that is
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and on_gpu:
                self.marks.add(t)
            elif isinstance(t, torch.Tensor) and not tensors and not self.marks.asked:
                self.marks.add(t, to=self.marks.open)
        return out

    def widened(self, packet, args, kwargs):
        """Products with a result wider than their operands, which a CPU lacks."""
        dtype, out = kwargs.pop("out_dtype", None), kwargs.pop("out")
        operands = [a.to(dtype or torch.float32) for a in args if isinstance(a, torch.Tensor)]
        return out.copy_(packet(*operands, **kwargs))


class Questions(TorchFunctionMode):
    """Above autograd: a tensor answers where it is, and moves between the devices."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return CUDA if args[0] in self.marks else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return args[0] in self.marks
        if func in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.to) and not args[0].is_meta:
            return self.move(func, *args, **kwargs)
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            self.marks.add(pinned, to=self.marks.pinned)
            return pinned
        if func is torch.Tensor.is_pinned:
            return args[0].untyped_storage()._cdata in self.marks.pinned
        if func is torch.Tensor.backward:
            with self:  # this mode, which is off in here
                ones = (torch.ones_like(args[0]),)
                return _engine_run_backward(args, ones, False, False, (), allow_unreachable=True, accumulate_grad=True)
        before, self.marks.asked = self.marks.asked, getattr(func, "__name__", "") in FACTORIES
        try:
            return func(*args, **kwargs)
        finally:
            self.marks.asked = before

    def move(self, func, tensor, *args, **kwargs):
        if func is torch.Tensor.numpy:
            assert tensor not in self.marks, "numpy of a tensor on cuda"
            return func(tensor, *args, **kwargs)
        to, dtype = torch.device("cpu") if func is torch.Tensor.cpu else kwargs.get("device"), kwargs.get("dtype")
        for a in args:
            if isinstance(a, torch.Tensor):
                to, dtype = a.device, a.dtype
            to, dtype = a if isinstance(a, torch.device | str) else to, a if isinstance(a, torch.dtype) else dtype
        now = tensor in self.marks
        if dtype is not None:
            tensor = tensor.type(dtype)
        if to is None or (torch.device(to).type == "cuda") == now:
            return tensor
        return Move.apply(tensor, self.marks, not now)


class Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, marks, to_gpu):
        ctx.marks, ctx.to_gpu = marks, to_gpu
        return copied(tensor, marks, to_gpu)

    @staticmethod
    def backward(ctx, grad):
        return copied(grad, ctx.marks, not ctx.to_gpu), None, None


def copied(tensor, marks, to_gpu):
    with torch._C._DisableTorchDispatch():
        copy = tensor.detach().clone()
    if to_gpu:
        marks.add(copy)
    return copy


@contextlib.contextmanager
def pretended(monkeypatch):
    """Within, torch.cuda.is_available() and there is one GPU. Gives the Operations, whose `products` were noted."""
    marks = Marks()
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    class Autocast(autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu", *args, **kwargs)

    gpu = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "synchronize": lambda *_: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_properties": lambda *_: type("H100", (), {"total_memory": 85e9, "name": "pretended"}),
    }
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(torch.amp, "autocast", Autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: enabled("cpu"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: dtype("cpu"))
    # asked within an operation, a saved tensor says "cpu", and "cuda" when it is computed again
    kind = "shape dtype".split()
    monkeypatch.setitem(checkpoint._allowed_determinism_checks_to_fns, "default", lambda t: [getattr(t, k) for k in kind])
    for module in ("kernels.divergence_triton", "kernels.logprob_triton"):  # the torch leaves stand in for them
        monkeypatch.setitem(sys.modules, module, None)
    real_empty, real_tensor = torch.empty, torch.tensor
    monkeypatch.setattr(torch, "empty", functools.wraps(real_empty)(lambda *a, pin_memory=False, **k: real_empty(*a, **k)))

    def tensor(data, *, device=None, **options):
        made = real_tensor(data, **options)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    operations = Operations(marks)
    with Questions(marks), operations:
        yield operations
