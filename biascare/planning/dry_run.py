"""One training step in shapes alone: operations, kept activations and peak memory, by part.

    with torch.device("meta"):
        step = TrainStep(...)
    cost = dry_run(step, batch, part_of)

The step itself runs, forward and backward, on parameters without storage. So the numbers follow the
code: a module that is rewritten changes its own estimate. Three things stand in for a GPU:

- Floating-point tensors are shapes; integers and booleans are real and on the CPU, so that image
  grids, token positions and prompt labels steer the code as in a run. Integers that would come from
  floating-point values (which row is hardest, where it is wrong) are arbitrary.
- Attention is sent to the fused kernels a GPU would take; they keep no matrix of scores.
- Memory counts tensors from their first use to their last, as an allocator without gaps would.
  Weights, gradients of parameters and optimizer states are not in it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from biascare.interfaces import Batch

aten = torch.ops.aten

FORWARD, BACKWARD, RECOMPUTE = "forward", "backward", "recompute"
PHASES = (FORWARD, BACKWARD, RECOMPUTE)

OTHER = "losses and the rest"
"""Part of everything outside the named modules."""

BIAS_ALIGNMENT = 16
"""GPU kernels want rows of an attention bias to start at multiples of this many elements."""

Place = tuple[str, str]
"""(part, phase)"""


class StepCost(NamedTuple):
    """What one micro-batch costs on one rank."""

    flops: dict[Place, int]  # a multiplication and an addition are two
    kept_bytes: dict[str, int]  # activations kept from forward to backward, by part
    peak_bytes: dict[Place, int]  # what is alive at the fullest moment, by where it was made

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def total_kept(self) -> int:
        return sum(self.kept_bytes.values())

    @property
    def peak(self) -> int:
        return sum(self.peak_bytes.values())


class Clock:
    """Where the step is: inside which part, going forward, backward, or forward again."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.in_backward = False
        self.backward_part = OTHER

    @property
    def place(self) -> Place:
        # A forward hook that fires in the backward pass is a checkpointed block going over its way
        # again; outside every module the gradient itself says where it is.
        if self.inside:
            return self.inside[-1], RECOMPUTE if self.in_backward else FORWARD
        return (self.backward_part, BACKWARD) if self.in_backward else (OTHER, FORWARD)

    def leave(self, part: str, module: nn.Module, arguments: Any, output: Any) -> None:
        """A forward hook, the part given; later notes that the gradient has reached the part."""

        def arrive(grad: Tensor) -> None:
            self.backward_part = part

        self.inside.pop()
        if self.in_backward:  # no gradient comes to the outputs of a recomputation
            return
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(arrive)


@contextmanager
def followed(
    module: nn.Module, part_of: Callable[[str], str | None], clock: Clock
) -> Iterator[None]:
    """Let the clock follow every submodule that belongs to a part."""
    with ExitStack() as stack:
        for name, child in module.named_modules():
            part = part_of(name)
            if part is not None:
                enter = child.register_forward_pre_hook(
                    lambda module, arguments, part=part: clock.inside.append(part)
                )
                # A checkpointed block leaves by an exception once it has recomputed enough.
                leave = child.register_forward_hook(partial(clock.leave, part), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        yield


class Ledger:
    """Bytes alive, by the place they were made, and a picture of the fullest moment."""

    def __init__(self) -> None:
        self.alive: Counter[Place] = Counter()
        self.total = self.highest = 0
        self.fullest: dict[Place, int] = {}
        self.known: dict[int, tuple[Any, Place | None]] = {}

    def add(self, tensor: Tensor, place: Place | None) -> None:
        """Count a storage until it is freed, the first time it is met; without a place, never."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.known:  # a view, or what an operation has written in place
            return
        # By weak reference: a ledger that holds what it counts would never see it freed.
        self.known[key] = (weakref.ref(storage, lambda _: self._drop(key, size)), place)
        if place is not None:
            self.alive[place] += size
            self.total += size
            # A copy, because by the end of the step nearly nothing is alive.
            if self.total > self.highest:
                self.highest, self.fullest = self.total, dict(self.alive)

    def _drop(self, key: int, size: int) -> None:
        place = self.known.pop(key)[1]  # the same id may belong to another storage from now on
        if place is not None:
            self.alive[place] -= size
            self.total -= size


COUNTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}
"""torch's own counts, and those of the fused attention of the CPU, which it lacks."""


class ShapesOnly(TorchDispatchMode):
    """Runs operations on shapes, keeps integers real, and counts."""

    def __init__(self, clock: Clock, ledger: Ledger):
        super().__init__()
        self.clock = clock
        self.ledger = ledger
        self.flops: Counter[Place] = Counter()
        self.met: dict[Hashable, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = self._run(func, args, kwargs)
        # By packet: an operation costs the same in all of its overloads.
        count = COUNTS.get(func._overloadpacket)
        if count is not None:
            self.flops[self.clock.place] += count(*args, **kwargs, out_val=output)
        for tensor in _tensors(output):
            self.ledger.add(tensor, self.clock.place)
        return output

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation; see the head of the module for what is real."""
        tensors = list(_tensors((args, kwargs)))
        shapes = [x for x in tensors if x.is_meta]
        if not shapes:
            output = func(*args, **kwargs)
            # Integers bound for the meta device (positions, counts) stay real: they steer the code.
            if torch.device(kwargs.get("device") or "cpu").type != "meta":
                return output
            if any(x.is_floating_point() for x in _tensors(output)):
                return output
            return func(*args, **kwargs | {"device": "cpu"})
        if func is aten._local_scalar_dense.default:
            return 0  # of a value that exists in a run alone; nothing's size may depend on it
        if len(shapes) < len(tensors):
            if func in INDEXING:  # before a mask loses its values with its storage
                args = (args[0], _positions(args[1]), *args[2:])
            args, kwargs = _as_shapes(args), _as_shapes(kwargs)
        # Layers repeat, so most operations were met before and the shape of their result is known.
        # Not where the result shares storage with an argument: a new one would be counted as more.
        arguments, returns = func._schema.arguments, func._schema.returns
        shared = any(x.alias_info is not None for x in (*arguments, *returns))
        if shared or len(returns) != 1 or func in SECRET_VIEWS:
            return func(*args, **kwargs)
        key = func, _key(args), _key(kwargs)
        if key in self.met:
            size, stride, dtype = self.met[key]
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            self.met[key] = output.shape, output.stride(), output.dtype
        return output


INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)

SECRET_VIEWS = (aten._unsafe_view.default, aten.lift_fresh.default)
"""Operations whose result shares storage without saying so in their schema."""


def _key(value: Any) -> Hashable:
    """Everything the shape of a result can depend on; the type too, since 1 equals 1.0 and True."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_key(x) for x in value)
    if isinstance(value, dict):
        return tuple((name, _key(x)) for name, x in value.items())
    return type(value), value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors among arguments and results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _as_shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list | tuple):
        return type(value)(_as_shapes(x) for x in value)
    if isinstance(value, dict):
        return {name: _as_shapes(x) for name, x in value.items()}
    return value


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks as integers: how many are set is known only of a real mask."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not index.is_meta
        found.extend(index.nonzero().unbind(1) if is_mask and index is not None else [index])
    return found


@contextmanager
def replaced_functions(attention_of: str) -> Iterator[None]:
    """On the meta device, torch's attention is the kernel of a device, `take_along_dim` does not
    compare the devices of its arguments, and `autocast` does nothing."""
    original = torch.autocast

    def autocast(device_type: str, *arguments: Any, **keywords: Any) -> Any:
        # The meta device has no dtype to cast to, and torch refuses to be asked.
        if device_type == "meta":
            return nullcontext()
        return original(device_type, *arguments, **keywords)

    library = Library("aten", "IMPL")
    attention = {"cuda": _gpu_attention, "cpu": _cpu_attention}[attention_of]
    # Before autograd, so that the backward pass is that of the kernel and not of its parts.
    library.impl("scaled_dot_product_attention", attention, "AutogradMeta")
    library.impl("take_along_dim", _take_along_dim, "AutogradMeta")
    # Modules look the class up in torch when they run, so it is exchanged there, and put back.
    vars(torch)["autocast"] = autocast
    try:
        yield
    finally:
        vars(torch)["autocast"] = original
        library._destroy()


def _take_along_dim(x: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    if dim is None:
        return x.flatten().gather(0, indices.flatten())
    # Everything but `dim` is broadcast, as torch's own function does it.
    others = ([*t.shape[:dim], *t.shape[dim:][1:]] for t in (x, indices))
    shape = torch.broadcast_shapes(*others)
    whole = [[*shape[:dim], t.shape[dim], *shape[dim:]] for t in (x, indices)]
    return x.expand(whole[0]).gather(dim, indices.expand(whole[1]))


def _gpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention where it applies (half precision, no bias), else the memory-efficient one."""
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        # Flash kernels want heads of a multiple of 8 channels, and torch pads others to it.
        width = query.shape[-1]
        q, k, v = (pad(x, (0, -width % 8)) if width % 8 else x for x in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)
        return out[0][..., :width]
    if enable_gqa:  # the memory-efficient kernel knows no groups: keys are copied, and that counts
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    bias = attn_mask
    if bias is not None:
        # As PyTorch prepares it for its kernel: in the query's dtype, rows padded, then cut again.
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, float("-inf"))
        bias = pad(bias, (0, -bias.shape[-1] % BIAS_ALIGNMENT))[..., : bias.shape[-1]]
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The CPU's flash attention, or plain products where the bias wants a gradient."""
    # The CPU's kernel has no gradient for its mask, and torch then takes the plain products.
    if attn_mask is not None and attn_mask.requires_grad:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
            ~attn_mask, float("-inf")
        )
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def dry_run(
    step: nn.Module,
    batch: Batch,
    part_of: Callable[[str], str | None],
    *,
    attention_of: str = "cuda",
) -> StepCost:
    """Forward and backward of one micro-batch of `TrainStep` on the meta device.

    `batch`: images and pixel values on the meta device, everything else real and on the CPU.
    `part_of`: module name -> part, or None for a module that belongs to its parent's.
    `attention_of`: "cuda" or "cpu", whose attention kernels to assume.
    """
    clock, ledger = Clock(), Ledger()
    kept: dict[int, tuple[Any, str]] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Once per storage, however many operations keep a view of it. Weights stay anyway; what has
        # no place is the batch's own.
        storage = tensor.untyped_storage()
        _, place = ledger.known.get(id(storage), (None, None))
        if id(storage) not in weights:
            kept[id(storage)] = (storage, place[0] if place else OTHER)
        return tensor

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None  # DeepSpeed moves it to a buffer of its own, which is counted there

    with ExitStack() as stack:
        owned = [*step.parameters(), *step.buffers()]
        weights = {id(x.untyped_storage()): x.untyped_storage() for x in owned}
        for tensor in owned:
            ledger.add(tensor, None)
        for parameter in (p for p in step.parameters() if p.requires_grad):
            handle = parameter.register_post_accumulate_grad_hook(let_go)
            stack.callback(handle.remove)
        stack.enter_context(replaced_functions(attention_of))
        stack.enter_context(followed(step, part_of, clock))
        shapes = stack.enter_context(ShapesOnly(clock, ledger))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = step(batch, 1, 1)["loss"]
        kept_bytes: Counter[str] = Counter()
        for storage, part in kept.values():
            kept_bytes[part] += storage.nbytes()
        # Let go before the backward pass, which has to free activations as it uses them.
        kept.clear()
        clock.in_backward = True
        loss.backward()
    return StepCost(
        flops=dict(shapes.flops), kept_bytes=dict(kept_bytes), peak_bytes=dict(ledger.fullest)
    )
