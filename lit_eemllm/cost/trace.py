"""What a training step computes and keeps: the real model, forward and backward, on tensors without data.

So the step of a 7B model takes seconds on a laptop, and what is frozen, cast or shared is as it will be. FLOPs are
counted by PyTorch's own counter, activations by hooks on what autograd saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..compat.torch import LiveBytes, flop_counter, storage_id
from ..core.decoder import DecoderLayer
from ..inputs.images import Transform
from ..inputs.reduction import EACH, Grids, Order, Reduction
from ..layout import PackedBatch, Run, SequenceLayout
from ..mechanisms import Features, Mechanism
from ..model.packed import LOGITS
from ..training.adapters import MARK
from ..training.fsdp2 import shared_out, sums_late
from ..training.module import compute_dtype
from ..training.tuning import moment_bytes
from .weightless import Fused, Parts, build_weightless

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..model import EEMLLM

LOSS_BYTES = 12  # a logit as the backward pass begins: its float32 log-probability, that one's gradient and its own
KL_BYTES = 16
"""More, where the KL of a teacher is computed: both logits, both log-probabilities and three on the way, in place of the gradients."""


@dataclass(frozen=True)
class Document:
    """One image of so many visual tokens, then text, of which so many tokens are supervised.

    Attributes:
        size: width and height of the image, whose tokens these are; None: the encoder computes the share of the largest image that has
            as many.
    """

    text: int
    visual: int
    targets: int
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Step:
    """One document on its way through a training step.

    A matrix product of F FLOPs costs the backward pass F for each of its two factors that needs a gradient: 2F with a
    trained weight, F with a frozen one, if something before it is trained; else F and nothing. Attention costs twice its
    FLOPs. It is counted full, and what kernels compute again is not counted.

    Attributes:
        parameters, trained: numbers of parameters.
        vision_width: of the encoder's features.
        encoder_flops, connector_flops, decoder_flops, head_flops: of the forward pass. The connector stands between
            encoder and decoder; a projector that a layer calls counts with the decoder.
        teacher_flops: of the forward pass of a teacher, which has no backward pass.
        backward_flops: of everything.
        weights, gradients, optimiser: bytes, of the optimiser AdamW's two moments.
        deferred: FSDP2 sums gradients over ranks once a step, and not after each pack.
        late: of the gradients, those of linear layers in the first unit and in what is below it, which come last.
        gathered: bytes of weights and gradients that are whole on each GPU although they are sharded: of the largest module
            that is sharded by itself, the next one, the gradient of the first and its float32 copy that is summed over
            ranks, and all that is in none of them.
        copies, unit_copies, rest_copies: bytes of 16-bit copies of float32 weights, which autocast makes and the backward
            pass needs; the most of a unit; those that are left where FSDP2 gathers weights in 16 bits.
        activations: bytes saved for the backward pass. Attention saves queries, keys, values, output and a number a row.
        kept, largest: likewise if each unit saves its input alone: all that stays, and what the largest unit saves when it
            is recomputed.
        below: of what is kept, that of encoder and connector, and the input of the first unit, which stay to the end.
        inputs: of what is kept, the inputs of all units but the first, which can be in main memory while one is computed again.
        logits: bytes at the loss; of all documents of a pack at most `loss_chunk`, if that is not 0.
        passing: bytes beside what is saved that the largest unit takes at most while it is computed again and differentiated:
            gradients on their way, such as those of a product and of its two factors (gate and up), and what is cast.
    """

    parameters: int
    trained: int
    vision_width: int
    encoder_flops: float
    connector_flops: int
    decoder_flops: int
    head_flops: int
    teacher_flops: float
    backward_flops: float
    weights: int
    gradients: int
    optimiser: int
    deferred: bool
    late: int
    gathered: int
    copies: int
    unit_copies: int
    rest_copies: int
    activations: float
    kept: float
    largest: int
    below: float
    inputs: int
    logits: int
    loss_chunk: int
    passing: int

    @property
    def forward_flops(self) -> float:
        return self.encoder_flops + self.connector_flops + self.decoder_flops + self.head_flops

    def most_bytes(
        self,
        documents: int,
        *,
        gpus: int = 1,
        sharded: bool = False,
        checkpointing: bool = False,
        offload: bool = False,
        accumulate: int = 1,
    ) -> float:
        """Most bytes on a GPU at any time of a step.

        Weights and optimiser stay. Gradients appear while activations go, and stay if several packs make a step. The
        backward pass begins with all activations, or with what is kept and the last unit recomputed, and ends with all
        gradients but the late ones, the first unit and what is below it; then AdamW, whose kernels on a GPU take nothing beside, has
        all gradients. DDP holds these a second time, in buckets. FSDP2 divides weights, gradients and optimiser; of several packs the gradients stay whole until the
        last, if they are `deferred`.

        Args:
            documents: in a pack.
            gpus: how many.
            sharded: FSDP2, otherwise DDP.
            checkpointing: of activations.
            offload: with it, of inputs of units to main memory.
            accumulate: packs a step.
        """
        stays, gradients, late = float(self.weights + self.optimiser), float(self.gradients), float(self.late)
        gathered, copies, unit_copies = 0, self.copies, self.unit_copies
        if gpus > 1 and sharded:
            stays, gathered = stays / gpus, self.gathered
            if not self.deferred or accumulate == 1:
                gradients, late = gradients / gpus, late / gpus
            copies, unit_copies = self.rest_copies, 0
        elif gpus > 1:
            stays += gradients
        kept = self.kept - offload * self.inputs
        moment = documents * (self.largest + self.passing) + unit_copies + gathered
        logits = self.at_loss(documents)
        begins = documents * self.activations + max(logits, documents * self.passing) + copies + gathered
        if checkpointing:
            loss = documents * kept + logits + copies + gathered
            begins = max(loss, documents * kept + moment)
        ends = gradients - late + documents * self.below + moment
        return stays + max(begins + gradients * (accumulate > 1), ends, gradients)

    def at_loss(self, documents: int) -> float:
        """Bytes of a pack's logits at a time."""
        return min(documents * self.logits, self.loss_chunk or math.inf)

    def most_documents(self, limit: float, **options: Any) -> int:
        """The largest pack whose step stays within so many bytes, with the options of `most_bytes`; 0 if none does."""
        low, high = 0, 1 << 24
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.most_bytes(middle, **options) <= limit else (low, middle - 1)
        return low


def trace(
    config: Config, parts: Parts, mechanism: Mechanism, document: Document, teacher: Mechanism | None = None
) -> Step:
    """Take a document through a step with the tuning, the types and the precision of `config`, and perhaps with a teacher."""
    model, mode = build_weightless(config, parts, mechanism)
    transform, dtype = model.vision.transform, compute_dtype(config)
    size = document.size or transform.largest
    images = document.visual / transform.num_tokens(*size)
    shape = transform(Image.new("RGB", size)).shape
    grids, cut = grids_of(transform, document)
    with mode:
        pixels = torch.empty(1, *shape)
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with autocast, recording(model) as encoder:
        features, _ = model.ranked_features(pixels)
    encoder_backward = backward(features) if features.requires_grad else 0
    # As many as make the document's tokens, whatever the encoder gives.
    features = features.new_empty(EACH.count(grids), features.shape[-1], requires_grad=features.requires_grad)
    given = Features(features, cut, grids, features.new_empty(document.visual))
    model._features = lambda pixels, sizes, layout: given  # type: ignore[method-assign]
    with autocast, recording(model) as rest:
        logits = model.packed_logits(pack(document, model.image_rotary is not None))
    if mechanism.encoder_depths or any(
        row.source == "own" for row in model.table
    ):  # layers take it from where it is, not from their input
        rest.outside.given[storage_id(features.untyped_storage())] = features.untyped_storage()

    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    decoder_flops, head_flops = sum(unit.flops for unit in rest.units), 2 * logits.numel() * parts.decoder.hidden_size
    apart, itemsize = shared_out(model), 4 if dtype is None else dtype.itemsize
    stored = [weight_bytes(module, config) for module in apart]
    whole = max(min(n, itemsize * numbers(module)) for n, module in zip(stored, apart, strict=True))
    reduced = max(numbers(module, trained=True) for module in apart) * (itemsize + 4)
    weights = weight_bytes(model, config)
    return Step(
        parameters=numbers(model),
        trained=numbers(model, trained=True),
        vision_width=model.vision.hidden_size,
        encoder_flops=images * encoder.flops,
        connector_flops=rest.flops - decoder_flops - head_flops,
        decoder_flops=decoder_flops,
        head_flops=head_flops,
        teacher_flops=0.0 if teacher is None else trace(config, parts, teacher, document).forward_flops,
        backward_flops=images * encoder_backward + backward(logits),
        weights=weights,
        gradients=gradients,
        optimiser=sum(moment_bytes(p, config.optim.states) for p in model.parameters() if p.requires_grad),
        deferred=sums_late(config),
        late=sum((encoder.outside.gradients | rest.before.gradients | rest.units[0].gradients).values()),
        gathered=weights - sum(stored) + 2 * whole + reduced,
        copies=encoder.copies + rest.copies,
        unit_copies=max(unit.copies for unit in rest.units),
        rest_copies=encoder.rest_copies + rest.rest_copies,
        activations=images * encoder.activations() + rest.activations(),
        kept=images * encoder.activations() + rest.kept(),
        largest=max(nbytes(unit.saved) for unit in rest.units),
        below=images * encoder.activations() + rest.below(),
        inputs=rest.inputs(),
        loss_chunk=LOSS_BYTES * LOGITS * (teacher is None),
        logits=(LOSS_BYTES + KL_BYTES * (teacher is not None)) * logits.numel(),
        passing=passing(model, autocast, rest.units),
    )


def grids_of(transform: Transform, document: Document) -> tuple[Grids, Order | None]:
    """Grids of features that become the document's visual tokens: those of its image; else a line of squares, or as many views of the
    largest image as give enough."""
    visual, largest = document.visual, transform.largest
    tiled = transform.order([]) is not None  # a newline is no feature
    size = largest if document.size is None and tiled and visual == transform.num_tokens(*largest) else document.size
    if size is not None:
        return transform.view_grids([size]), transform.order([size])
    side, view = transform.reduction.side, transform.largest_view
    if type(transform.reduction).grid is Reduction.grid:
        return ((side, side * visual),), None
    grids = (view,) * -(-visual // transform.reduction.count((view,)))
    made = transform.reduction.count(grids)
    return grids, None if made == visual else Order(torch.arange(visual), made)


def passing(model: EEMLLM, autocast: torch.autocast, units: list[Part]) -> int:
    """See `Step`: measured as the largest unit, the last of these, is really computed again, by checkpointing, and differentiated.
    Gradients of weights, which do not grow with the documents, are left out."""
    number, unit = max(enumerate(units), key=lambda each: (nbytes(each[1].saved), each[0]))
    x_Th, x_Vh, stream, *kept = unit.inputs
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in (x_Th, x_Vh)]
    inputs[0].requires_grad_(x_Th.requires_grad or not x_Vh.requires_grad)
    layer, stream = model.language_model.model.layers[number], replace(stream, backend=Fused())
    with LiveBytes() as live:
        with autocast:
            out = checkpoint(
                model.run_layer, layer, *inputs, stream, *kept, use_reentrant=False, preserve_rng_state=False
            )[:2]
        outputs = {storage_id(x.untyped_storage()): x for x in out if x.requires_grad and x.grad_fn is not None}
        gradients = [torch.empty_like(x) for x in outputs.values()]
        live.peak, there = live.now, live.now - sum(x.nbytes for x in gradients)
        wanted = [x for x in inputs if x.requires_grad]
        torch.autograd.grad(list(outputs.values()), wanted, gradients, allow_unused=True)
    return max(0, live.peak - there - nbytes(unit.saved) - unit.copies)


def pack(document: Document, by_place: bool) -> PackedBatch:
    """The document without pixels, as its features are given; with positions of rows and columns, of a line."""
    layout = SequenceLayout.of([[Run(True, document.visual), Run(False, document.text)]])
    ids, rows = torch.zeros_like(layout.positions), torch.arange(document.targets)
    layout = layout.with_grid_positions([(1, document.visual)]) if by_place else layout
    return PackedBatch(ids, rows, torch.zeros_like(rows), None, layout, [])


def backward(output: Tensor) -> int:
    """FLOPs of the backward pass from an output."""
    with flop_counter() as counted:
        output.backward(torch.empty_like(output))
    return counted.get_total_flops()


QUANTISED = {
    "nf4": 0.5 + 1 / 64 + 4 / 64 / 256,
    "int8": 1.0,
}  # bytes a weight; scales of 64 in 8 bits, of 256 such in 32


def numbers(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def weight_bytes(module: nn.Module, config: Config) -> int:
    """With linear layers of the decoder, adapters not, quantised as the configuration says."""
    total = sum(p.nbytes for p in module.parameters())
    if config.model.quantization is not None:
        for layer in [part for part in module.modules() if isinstance(part, DecoderLayer)]:
            for name, linear in layer.named_modules():
                if isinstance(linear, nn.Linear) and MARK not in name:
                    small = linear.weight.numel() * QUANTISED[config.model.quantization]
                    total += round(small) - linear.weight.nbytes
    return total


# --- what a forward pass leaves behind
@dataclass
class Part:
    """FLOPs of a part of the forward pass, what it is called with, the storages that it is given and that it saves for the backward
    pass, bytes of the 16-bit copies of weights among these, and of the gradients of its linear layers, by their names."""

    flops: int = 0
    copies: int = 0
    inputs: tuple[Any, ...] = ()
    gradients: dict[str, int] = field(default_factory=dict)
    given: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    saved: dict[int, torch.UntypedStorage] = field(default_factory=dict)


@dataclass
class Recording:
    """A forward pass: its units, which activation checkpointing would recompute, and what lies outside of them.

    A unit is a decoder layer with the block that the mechanism adds before it, if there is one. What is saved outside before
    the first of them stands in `before` too.
    """

    flops: int = 0
    rest_copies: int = 0
    outside: Part = field(default_factory=Part)
    before: Part = field(default_factory=Part)
    units: list[Part] = field(default_factory=list)

    @property
    def copies(self) -> int:
        return sum(part.copies for part in (self.outside, *self.units))

    def activations(self) -> int:
        return sum(nbytes(part.saved) for part in (self.outside, *self.units))

    def kept(self) -> int:
        """If units save their input alone."""
        storages = self.outside.saved | self.outside.given
        for unit in self.units:
            storages |= unit.given if unit.saved else {}
        return nbytes(storages)

    def inputs(self) -> int:
        """Of what is kept, those of units, without the first."""
        return self.kept() - nbytes(self.outside.saved | self.outside.given | self.units[0].given)

    def below(self) -> int:
        return nbytes(self.before.saved | self.units[0].given)


def nbytes(storages: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def is_copy(tensor: Tensor, weight: Tensor) -> bool:
    """In another type, but of the same shape and, which tells it from an input, in the same order."""
    return (tensor.shape, tensor.stride()) == (weight.shape, weight.stride()) and tensor.dtype != weight.dtype


@contextmanager
def recording(model: EEMLLM) -> Iterator[Recording]:
    """Record the forward pass that runs meanwhile. What belongs to parameters is not saved, it is there anyway."""
    found = Recording()
    now, seen = found.outside, {storage_id(p.untyped_storage()) for p in model.parameters()}
    counted, apart = flop_counter(), {module for part in shared_out(model) for module in part.modules()}
    held: list[torch.UntypedStorage] = []  # or another could get the address of one
    linear: nn.Linear | None = None

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage_id(storage) not in seen:
            seen.add(storage_id(storage))
            held.append(storage)
            if linear is not None and is_copy(tensor, linear.weight.t()):
                now.copies += storage.nbytes()
                found.rest_copies += storage.nbytes() * (linear not in apart)
            else:
                now.saved[storage_id(storage)] = storage
        return tensor

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal now
        if now is found.outside:  # else in the layer after a block
            given = [x.untyped_storage() for x in args if isinstance(x, Tensor)]
            now = Part(
                -counted.get_total_flops(), inputs=args, given={storage_id(storage): storage for storage in given}
            )
            if not found.units:
                found.before = Part(gradients=dict(now.gradients), saved=dict(now.saved))
            found.units.append(now)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal now
        now.flops += counted.get_total_flops()
        now = found.outside

    def begin(module: nn.Linear, args: tuple[Tensor]) -> None:
        nonlocal linear
        linear = module
        now.gradients |= {names[p]: p.nbytes for p in module.parameters() if p.requires_grad}

    names = {parameter: name for name, parameter in model.named_parameters()}
    hooks = [module.register_forward_pre_hook(begin) for module in model.modules() if isinstance(module, nn.Linear)]
    hooks += [block.register_forward_pre_hook(enter) for block in model.blocks.values()]
    for layer in model.language_model.model.layers:
        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    with counted, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield found
    found.flops = counted.get_total_flops()
    for hook in hooks:
        hook.remove()
