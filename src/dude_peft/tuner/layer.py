"""The adapted layer: a frozen layer, and for every adapter its frozen start, its trained deviations, its gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from typing_extensions import override

from dude_peft.artifact.effective import effective_weight, layer_gain, merged_weight
from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.form import Form
from dude_peft.artifact.stacks import first_tensors
from dude_peft.artifact.stock import LayerTensors, layer_tensors
from dude_peft.core.linear import FrozenProduct, adapted_linear
from dude_peft.core.magnitude import (
    Change,
    direction_change,
    gain,
    gain_slope,
    norm_change,
    row_norm,
    whole_direction_change,
)
from dude_peft.core.orthogonality import orthogonality
from dude_peft.core.precision import cast, no_autocast
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.methods import Delta, Method
from dude_peft.methods.start import Start
from dude_peft.parents import fits
from dude_peft.show import a_
from dude_peft.tuner import frozen
from dude_peft.tuner.config import DudeConfig
from dude_peft.tuner.maps import stock_kernel
from dude_peft.tuner.offloaded import device_of, held, is_offloaded
from dude_peft.tuner.refresh import current_gain, register, start_product, state_of
from dude_peft.tuner.starts import start_of_layer
from dude_peft.tuner.steps import steps_taken
from dude_peft.tuner.together import Kind, Stale, Together, is_here, kind_of
from dude_peft.tuner.weight import readable

# On the layer, by adapter: parameters are trained, buffers are frozen; lora_t and lora_f hold the named tensors of a
# delta. None of these names is a stock LoRA name, so that a raw state dict of ours cannot be taken for a stock adapter.
TRAINED = ("lora_dA", "lora_dB", "lora_dm", "lora_t")
FROZEN = ("lora_A0", "lora_B0", "lora_m0", "lora_f")
# The names of `start_tensors`, and where their tensors are.
_PARAMETERS = (("dA", "lora_dA"), ("dB", "lora_dB"), ("dm", "lora_dm"))
_BUFFERS = (("A0", "lora_A0"), ("B0", "lora_B0"), ("m0", "lora_m0"))
# What follows from these, by adapter: W0 A0^T (out, r); the gain (out,) and its slope (out,).
_CACHED = ("_starts", "_gains")
# Layers of the Llama family whose output nothing behind them keeps for its backward: it is rotated, or added to the
# residual stream. A wrong guess costs memory, nothing else.
_OUTPUT_NOT_KEPT = ("q_proj", "k_proj", "o_proj", "down_proj")


@fits(uses=("adapter_layer_names", "other_param_names", "_disable_adapters", "_modules"))
class DudeLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer with any number of adapters.

    Shapes: lora_dA (r, in), lora_dB (out, r), lora_dm (out,); lora_A0, lora_B0, lora_m0 likewise; those of lora_t and
    lora_f as the method's delta has them.
    """

    adapter_layer_names = TRAINED
    other_param_names = (
        *FROZEN, *_CACHED, "_deltas", "r", "lora_alpha", "scaling", "own_scaling", "lora_dropout", "norm_gradient"
    )  # fmt: skip
    # PEFT's `disable_input_dtype_casting` sets it; the input is never cast here.
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.shape = frozen.shape_of(self.target())
        self.out_features, self.in_features = self.shape[-2:]
        self.lora_dA, self.lora_dB, self.lora_dm = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.lora_A0, self.lora_B0, self.lora_m0 = (BufferDict(persistent=True) for _ in range(3))
        # Modules once an adapter needs them: a walk over a model takes time for each, and loading walks often.
        self.lora_t: Any = {}
        self.lora_f: Any = {}
        self.lora_dropout: Any = {}
        self._deltas: dict[str, Delta] = {}
        # Computed when they are asked for, and again when what they follow from has changed. They are replaced, never
        # written to: a graph whose backward is still to come holds them.
        self._starts: dict[str, _Cached] = {}
        self._gains: dict[str, _Cached] = {}
        self._mode_changes = 0
        self._number = register(self)
        self.join(Together())
        self._output_kept = layer_name.rpartition(".")[2] not in _OUTPUT_NOT_KEPT
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.own_scaling: dict[str, float] = {}  # as rank and alpha have it; `scaling` is what a user may change
        self.norm_gradient: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # The base layer's own weight while a merged one is in its place: a parameter, so that it moves with the model,
        # and named as an adapter's, so that TRL does not send it to a server as one of the base model's.
        self.lora_unmerged_weight: Any = None
        # An opaque layer may rewrite its stored tensors (bitsandbytes packs them for inference): hashed before its use.
        opaque = frozen.plain_weight(self.target()) is None and self._base_device().type != "meta"
        self._opaque_print = frozen.layer_fingerprint(self.target()) if opaque else None
        self._fingerprint: tuple[tuple[int, int, str], TensorPrint] | None = None

    def target(self) -> frozen.Frozen:
        """What the adapters change: the frozen layer under them."""
        return self.get_base_layer()

    @override
    def get_base_layer(self) -> nn.Module:
        """The frozen layer, also under adapters of another kind."""
        base: Any = self._modules["base_layer"]
        # PEFT's asks every layer for one more below it, and torch takes microseconds to find that there is none.
        return base if type(base) is nn.Linear else super().get_base_layer()

    @property
    def form(self) -> Form:
        """How a file has its factors."""
        base = self.get_base_layer()
        return Form(isinstance(base, nn.Embedding), stock_kernel(base))

    def place(self, module_name: str) -> str:
        """The beginning of the names of the layer's tensors in a file, from its own place in the model."""
        return module_name

    def add(
        self, adapter_name: str, config: DudeConfig, meta: bool = False, starts: Sequence[Start] | None = None
    ) -> None:
        """Add an adapter: take its start out of the base weight, set the deviations to zero.

        An adapter that is about to be loaded from a file gets zeros instead of a start (which is the base model too).

        Args:
            adapter_name: name.
            config: configuration; its patterns decide this layer's rank and alpha.
            meta: leave all tensors on the meta device, for loading with low_cpu_mem_usage.
            starts: the start, one an expert of a stack, where it has been computed (`tuner.starts`); None computes it
                here.

        Raises:
            ConfigError: the rank does not fit the layer.
            NumericsError: NaN or Inf in the base weight.
        """
        r, alpha = config.rank_and_alpha(self.layer_name)
        spec, scaling = config.spec, config.spec.scaling(r, alpha)
        check_rank(spec, self.layer_name, self.shape, r)
        dtype = torch.promote_types(frozen.compute_dtype(self.target()), torch.float32)
        device = torch.device("meta") if meta else self._base_device()

        for group in (self.lora_dropout, self._deltas):  # of an adapter of the same name that was here before
            if adapter_name in group:
                del group[adapter_name]
        if config._loading is None and not meta:
            starts = starts or start_of_layer(self, self.layer_name, config)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, alpha
        self.scaling[adapter_name] = self.own_scaling[adapter_name] = scaling
        self.norm_gradient[adapter_name] = spec.gradient_through_norm(config.norm_gradient)
        tensors = first_tensors(spec, starts, r, self.shape, dtype, device)
        if spec.delta is not None:
            self._deltas[adapter_name] = spec.delta
            trained = nn.ParameterDict({name: tensors.pop(name) for name in spec.delta.trained})
            frozen_ones = {name: tensors.pop(name) for name in spec.delta.frozen}
            self._put_module("lora_t", adapter_name, trained)
            self._put_module("lora_f", adapter_name, BufferDict(frozen_ones, persistent=True))
        if config.lora_dropout > 0:
            self._put_module("lora_dropout", adapter_name, nn.Dropout(config.lora_dropout))
        for name, tensor in tensors.items():
            group = f"lora_{name}"
            getattr(self, group)[adapter_name] = _Trained(tensor) if group in TRAINED else tensor
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._follow_mode(adapter_name)

    def _put_module(self, group: str, adapter_name: str, module: nn.Module) -> None:
        if not isinstance(getattr(self, group), nn.Module):
            setattr(self, group, nn.ModuleDict())
        getattr(self, group)[adapter_name] = module

    @override
    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and trainable but in inference mode; all others wait.

        Args:
            adapter_names: one name or several.
            inference_mode: whether the active ones stay frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self.r:
            for parameter in self._trained(name):
                if parameter.is_leaf:  # FSDP's views are not
                    parameter.requires_grad_(name in names and not inference_mode)
        self._active_adapter = names

    def _trained(self, adapter_name: str) -> Iterator[Tensor]:
        """The parameters of one adapter."""
        for group in TRAINED:
            entries: Any = getattr(self, group)
            if adapter_name in entries:
                yield from entries[adapter_name].parameters()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer under its active adapters, (*, in) -> (*, out).

        Several active adapters add their changes: y = base + sum_i (y_i - base). Merged ones are in the base layer's
        weight; the others' changes are still those from its own weight.
        """
        if self.disable_adapters:
            return self._own_output(x, *args, **kwargs)
        base: Any = self._modules["base_layer"]  # past nn.Module's __getattr__, which takes longer
        names = self.unmerged_names()
        if not names:
            return base(x, *args, **kwargs)
        if self.merged:
            return self._beside_merged(names, x, *args, **kwargs)
        if len(names) == 1 and not args and not kwargs and frozen.is_dense(base, x):
            return self._adapt(names[0], x.to(self._base_device()) if is_offloaded(base) else x, None)
        base_out: Tensor = base(x, *args, **kwargs)
        y = self._adapt(names[0], x, base_out)
        for name in names[1:]:
            y = y + (self._adapt(name, x, base_out) - base_out)
        return y

    def effective_weight(self, adapter_names: list[str] | None = None) -> Tensor:
        """Merged weight `W0 + sum_i (W'_i - W0)`, (out, in), in float32 or better.

        Args:
            adapter_names: adapters to merge; None means the active ones.
        """
        names = self._names(self.active_adapters if adapter_names is None else adapter_names)
        return self._combined_weight(names, None)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's name for the change `W' - W0` of one adapter, in the layout of the base layer's weight."""
        change = self.effective_weight([adapter]).sub_(self.effective_weight([]))
        return frozen.as_stored(self.target(), change)

    @property
    @override
    def weight(self) -> Tensor:
        """What a module that reads the weight itself, instead of calling the layer, has to find: the effective weight.

        In the base weight's dtype and layout, and differentiable, without dropout; the base layer's own weight where no
        adapter is to be added, and where it is quantised or a shard.
        """
        if self.disable_adapters:
            own: Tensor = self._own_layer().weight
            return own
        base: Any = self.get_base_layer()
        names = self.unmerged_names()
        if not names or frozen.plain_weight(base) is None or frozen.is_sharded(base.weight):
            return super().weight
        trained = [tensor for name in names for tensor in self._trained(name)]
        return readable(held(base, "weight"), lambda: self._weight_with(names), trained)

    def _weight_with(self, names: list[str]) -> Tensor:
        """The base layer's weight with the changes of some adapters, as autograd follows it."""
        base: Any = self.get_base_layer()
        with no_autocast(self._base_device().type):
            W0 = self._base_weight()
            total = frozen.dense_weight(base)
            for name in names:
                layer, scaling = self.tensors(name), self.scaling[name]
                g = layer_gain(W0, layer, scaling, self.norm_gradient[name])
                total = total + (effective_weight(W0, layer, scaling, g) - W0)
            return frozen.as_stored(base, total.to(base.weight.dtype))

    def gain(self, adapter_name: str) -> Tensor | None:
        """Gain g = m / n of one adapter, (out,), float32 or better; None for methods without a magnitude.

        The values are computed once per optimizer step, in the first call behind it. With `norm_gradient="exact"` and
        gradients wanted, it is computed anew as a function of the deviations.
        """
        if adapter_name not in self.lora_m0:
            return None
        layer = self.tensors(adapter_name)
        if self._differentiates_norm(adapter_name):
            return self._exact_gain(adapter_name, layer)
        return self._gain_and_slope(adapter_name, layer)[0]

    def live_gain(self, adapter_name: str) -> Tensor | None:
        """Gain of one adapter as a function that autograd follows, (out,); None for methods without a magnitude."""
        layer = self.tensors(adapter_name)
        if layer.m0 is None:
            return None
        if self._differentiates_norm(adapter_name):
            return self._exact_gain(adapter_name, layer)
        g, slope = self._gain_and_slope(adapter_name, layer)
        return g if layer.dm is None else g + slope * (layer.dm - layer.dm.detach())  # its value stays, to the bit

    def _exact_gain(self, adapter_name: str, layer: LayerTensors) -> Tensor:
        assert layer.m0 is not None
        return gain(layer.m0, layer.magnitude_change(), self._norm_change(adapter_name, layer), "exact")

    def _differentiates_norm(self, adapter_name: str) -> bool:
        return self.norm_gradient[adapter_name] == "exact" and torch.is_grad_enabled()

    def refresh(self) -> None:
        """Take all that is cached as out of date; the next forward computes it.

        On the CPU every change of the trained tensors is noticed without it. On other devices optimizer steps, loading,
        moves, changes of mode and every operation that torch counts are; only writes past torch's count, as
        `parameter.data.copy_(...)`, need the call. So does a change of the base weight itself, anywhere.
        """
        self._starts.clear()
        self._gains.clear()

    def current(self, slot: int, start: bool) -> list[Tensor]:
        """Gain and slope, or W0 A0^T, up to date; called by compiled code, which knows the adapter by number."""
        name = self._slots[slot]
        layer = self.tensors(name)
        return [self._start_product(name, layer)] if start else list(self._gain_and_slope(name, layer))

    @property
    def _slots(self) -> list[str]:
        return list(self.lora_m0)

    def _gain_and_slope(self, adapter_name: str, layer: LayerTensors) -> tuple[Tensor, Tensor]:
        assert layer.m0 is not None
        if torch.compiler.is_exporting():  # to where this layer is not: the formula itself goes along
            q = self._norm_change(adapter_name, layer)
            g = gain(layer.m0, layer.magnitude_change(), q)
            return g, gain_slope(layer.m0, q).to(g.dtype)
        if torch.compiler.is_compiling():
            slot = self._slots.index(adapter_name)
            assert layer.dA is not None
            rows = layer.m0 if layer.dm is None else layer.dm.detach()
            return current_gain(self._number, slot, layer.dA.detach(), layer.dB.detach(), rows)
        state = self._state(adapter_name, layer)
        cached = self._kept_gain(adapter_name, state)
        if cached is None:
            return self._together.compute(Stale(self, layer, state), adapter_name)
        return cached.tensors  # type: ignore[return-value]

    def join(self, together: Together) -> None:
        """Have the gain computed with those of other layers."""
        self._together = together
        together.join(self)

    def stale(self, adapter_name: str, kind: Kind | None = None) -> Stale | None:
        """What is needed to compute the gain ahead of its use.

        Args:
            adapter_name: name.
            kind: what the layer has to be like; None for any.

        Returns:
            None: the gain is up to date, or has to wait for its layer, or the layer is not alike.
        """
        base, kept = self.target(), self.kept(adapter_name)
        if "m0" not in kept or not isinstance(base, nn.Module) or is_offloaded(base):
            return None
        needed = (*base._parameters.values(), *base._buffers.values(), *kept.values())
        if not all(is_here(tensor) for tensor in needed if tensor is not None):
            return None  # also before a delta is made of them
        if (weight := base._parameters.get("weight")) is not None and weight.ndim < 2:
            return None  # a share, as FSDP1 leaves it outside of a forward
        layer = layer_tensors(self._deltas.get(adapter_name), kept)
        if kind is not None and kind_of(layer, self.scaling[adapter_name]) != kind:
            return None  # before all of it is hashed
        state = self._state(adapter_name, layer)
        return Stale(self, layer, state) if self._kept_gain(adapter_name, state) is None else None

    def _kept_gain(self, adapter_name: str, state: tuple[Any, ...]) -> _Cached | None:
        cached = self._gains.get(adapter_name)
        return cached if cached is not None and cached.state == state else None

    def _state(self, adapter_name: str, layer: LayerTensors) -> tuple[Any, ...]:
        """Of all that the gain follows from: its scaling, and what is trained."""
        return (self.scaling[adapter_name], *state_of(layer.learned, lambda: (steps_taken(), self._mode_changes)))

    def keep_gain(self, adapter_name: str, state: tuple[Any, ...], gain: Tensor, slope: Tensor) -> None:
        """Take the gain and its slope as those of this state of the trained tensors."""
        self._gains[adapter_name] = _Cached(state, (gain, slope))

    def _start_product(self, adapter_name: str, layer: LayerTensors) -> Tensor:
        assert layer.A0 is not None
        assert layer.B0 is not None
        if torch.compiler.is_exporting():
            return self._product(layer.A0)
        if torch.compiler.is_compiling():
            return start_product(self._number, self._slots.index(adapter_name), layer.A0, layer.B0)
        state = state_of((layer.A0,))
        cached = self._starts.get(adapter_name)
        if cached is None or cached.state != state:
            with torch.inference_mode(False), torch.no_grad():
                cached = _Cached(state, (self._product(layer.A0),))
            self._starts[adapter_name] = cached
        return cached.tensors[0]

    def movement(self, adapter_name: str) -> dict[str, Tensor]:
        """How far each output row has moved, (out,): `magnitude` |m - m0| / m0, and `direction` 1 - cos(V, W0).

        A method without a magnitude has the second alone; there V is the whole weight.
        """
        layer = self.tensors(adapter_name)
        scaling = self.scaling[adapter_name]
        if layer.dA is None:
            return {"direction": whole_direction_change(self._base_weight(), scaling * layer.dB.double())}
        dA = layer.dA.to(torch.promote_types(layer.dA.dtype, torch.float32))
        start = None if layer.A0 is None else self._product(layer.A0)
        m0 = row_norm(self._base_weight()) if layer.m0 is None else layer.m0
        change = (self._product(dA), start, dA, layer.dB.to(dA.dtype), layer.A0, layer.B0)
        found = {"direction": direction_change(*change, scaling, m0)}
        if layer.dm is not None:
            found["magnitude"] = torch.where(m0 > 0, layer.dm.abs() / m0, 0.0)
        return found

    def orthogonality(self, adapter_name: str, groups: int) -> tuple[Tensor, Tensor]:
        """How far the delta weights of the adapter's groups of pairs are from orthogonal, to W0 and to each other.

        Differentiable in the trained factors; `core.orthogonality` has the formula. Not for methods with a delta.
        """
        layer = self.tensors(adapter_name)
        with no_autocast(self._base_device().type):
            return orthogonality(*self.change(adapter_name, layer), self.scaling[adapter_name], groups)

    def _norm_change(self, adapter_name: str, layer: LayerTensors) -> Tensor:
        with no_autocast(self._base_device().type):
            return norm_change(*self.change(adapter_name, layer), self.scaling[adapter_name])

    def change(self, adapter_name: str, layer: LayerTensors) -> Change:
        """What a norm is computed from: W0 dA^T, W0 A0^T, dA, dB, A0, B0."""
        assert layer.dA is not None
        dA = cast(layer.dA, torch.promote_types(layer.dA.dtype, torch.float32))
        start = None if layer.A0 is None else self._start_product(adapter_name, layer)
        return self._product(dA), start, dA, cast(layer.dB, dA.dtype), layer.A0, layer.B0

    @override
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the effective weight of some adapters into the base layer; `unmerge` restores every bit.

        The base layer gets a new parameter, so a weight that is shared (tied embeddings) stays as it is elsewhere.

        Args:
            safe_merge: PEFT's flag; NaN and Inf are always refused.
            adapter_names: None means the active adapters.

        Raises:
            ConfigError: the base weight is quantised.
            NumericsError: the merged weight overflows its dtype; nothing is changed then.
        """
        if adapter_names == []:
            return
        names = list(dict.fromkeys(self._names(check_adapters_to_merge(self, adapter_names))))
        if names:
            self._put_merged([*self.merged_adapters, *names])

    def check_mergeable(self) -> None:
        """Refuse to merge into a weight that is no plain float matrix."""
        base = self.target()
        if is_offloaded(base):
            raise ConfigError(
                f"the weight of '{self.layer_name}' is offloaded, and its next forward would read the unmerged one "
                "again; merge the files with dude merge, or load the model without device_map"
            )
        if frozen.plain_weight(base) is None:
            raise ConfigError(
                f"'{self.layer_name}' is {a_(type(base).__name__)}, which cannot be merged into; load the base model "
                "unquantised, load the adapter on it, and merge"
            )

    @override
    def unmerge(self) -> None:
        """Put the base layer's own weight back, the very tensor it was."""
        if self.lora_unmerged_weight is not None:
            self.give(self.lora_unmerged_weight)
            self.lora_unmerged_weight = None
        self.merged_adapters = []

    def keep_merged(self, adapter_names: list[str]) -> None:
        """Take all other merged adapters out of the base layer's weight."""
        kept = [name for name in self.merged_adapters if name in adapter_names]
        if not kept:
            self.unmerge()
        elif kept != self.merged_adapters:
            self._put_merged(kept)

    def _put_merged(self, names: list[str]) -> None:
        """Give the base layer the weight with exactly these adapters merged."""
        self.check_mergeable()
        base: Any = self.target()
        original = base.weight if self.lora_unmerged_weight is None else self.lora_unmerged_weight
        merged = self._combined_weight(names, original.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise NumericsError(
                f"the merged weight of '{self.layer_name}' overflows {original.dtype}; load the base in "
                f"float32 to merge"
            )
        self.lora_unmerged_weight = original
        self.give(nn.Parameter(frozen.as_stored(base, merged), requires_grad=False))
        self.merged_adapters = names

    def give(self, weight: nn.Parameter) -> None:
        """Put a weight, as it is stored, into the base layer."""
        base: Any = self.target()
        base.weight = weight

    def put_sum(self, weights: Mapping[str, float]) -> None:
        """Give the base layer `W0 + sum_i w_i (W'_i - W0)` for good; `weights` are w_i by the adapters' names."""
        self.check_mergeable()
        base: Any = self.target()
        names = self._names(list(weights))
        merged = self._combined_weight(names, base.weight.dtype, weights)
        self.give(nn.Parameter(frozen.as_stored(base, merged), requires_grad=False))

    @torch.no_grad()
    def put_factors(self, adapter_name: str, A: Tensor, B: Tensor, dm: Tensor | None) -> None:
        """Set what an adapter without a frozen start has trained: A (r, in), B (out, r), dm (out,)."""
        state = self.tensors(adapter_name)
        assert state.dA is not None
        state.dA.copy_(A)
        state.dB.copy_(B)
        if state.dm is not None and dm is not None:
            state.dm.copy_(dm)
        self.refresh()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of an adapter to `scale` times that of its rank and alpha, as PEFT's LoraLayer does.

        It scales the change of the direction; a trained magnitude stays, as it does in stock PEFT.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.own_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of all active adapters by `scale`."""
        for name in self._names(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of all active adapters by `scale`; None sets it to that of their rank and alpha."""
        for name in self._names(self.active_adapters):
            self.scaling[name] = self.own_scaling[name] if scale is None else self.scaling[name] / scale

    @override
    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; what is trained stays as it was (PEFT's own would set requires_grad)."""
        self._disable_adapters = not enabled

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Raises:
            ConfigError: it is merged, and could not be taken out of the weight any more.
        """
        if adapter_name in self.merged_adapters:
            raise ConfigError(
                f"adapter '{adapter_name}' is merged into '{self.layer_name}'; call unmerge_adapter() before you "
                "delete it"
            )
        super().delete_adapter(adapter_name)

    def kept(self, adapter_name: str) -> dict[str, Tensor]:
        """What one adapter keeps, by the names of `start_tensors`; the tensors themselves, not copies."""
        found: dict[str, Any] = {}
        modules: Any = self._modules  # past nn.Module's __getattr__, which takes longer than all else here
        for name, group in _PARAMETERS:
            entry = modules[group]._modules.get(adapter_name)
            if entry is not None:
                found[name] = entry._parameters.get("weight")
                if found[name] is None:  # FSDP1 puts plain tensors in the places of parameters
                    found[name] = entry.weight
        for name, group in _BUFFERS:
            tensor = modules[group]._buffers.get(adapter_name)
            if tensor is not None:
                found[name] = tensor
        if adapter_name in self._deltas:
            for group in ("lora_t", "lora_f"):
                found.update(modules[group][adapter_name].items())
        return found

    def tensors(self, adapter_name: str) -> LayerTensors:
        """State of one adapter; L and R of a delta are made anew."""
        return layer_tensors(self._deltas.get(adapter_name), self.kept(adapter_name))

    def base_fingerprint(self) -> TensorPrint:
        """Fingerprint of the base weight (of the unmerged one), computed once while the weight stays the same."""
        if self._opaque_print is not None:
            return self._opaque_print
        base: Any = self.target()
        weight = base.weight if self.lora_unmerged_weight is None else self.lora_unmerged_weight
        if self._fingerprint is not None and frozen.is_sharded(weight):
            return self._fingerprint[1]  # of the whole weight, taken before it was sharded
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, f"{weight.dtype}{weight.device}")
        if self._fingerprint is None or self._fingerprint[0] != key:
            with self.unmerged():
                self._fingerprint = (key, frozen.layer_fingerprint(base))
        return self._fingerprint[1]

    @override
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the adapter to LoRA by its delta weight; not with a magnitude."""
        return adapter_name not in self.lora_m0

    def _adapt(self, name: str, x: Tensor, base_out: Tensor | None) -> Tensor:
        """Output under one adapter; without the frozen layer's output, its product is taken inside."""
        layer = self.tensors(name)
        base: Any = self.get_base_layer()
        g = dm = slope = None
        if layer.m0 is not None and self._differentiates_norm(name):
            g = self._exact_gain(name, layer)
        elif layer.m0 is not None:
            dm, (g, slope) = layer.dm, self._gain_and_slope(name, layer)
        product = FrozenProduct(x, held(base, "weight")) if base_out is None else base_out
        bias = held(base, "bias") if g is not None or base_out is None else None
        factors = (layer.dA, layer.dB, layer.A0, layer.B0, g, bias, self.scaling[name], dm, slope)
        seen = self.dropped(name, x)
        own = None if base_out is None or seen is x else x
        return adapted_linear(product, seen, *factors, self._output_kept, self._product_rows, own)

    def dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        """What the change of one adapter sees of its input."""
        if adapter_name not in self.lora_dropout:
            return x
        seen: Tensor = self.lora_dropout[adapter_name](x)
        return seen

    def _beside_merged(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output with some adapters merged and others, `names`, active beside them."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        base_out = self._own_output(x, *args, **kwargs)
        for name in names:
            y = y + (self._adapt(name, x, base_out) - base_out)
        return y

    def _own_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the base layer with its own weight, merged or not."""
        if self.merged and "forward" in self.get_base_layer().__dict__:  # accelerate's, which knows this object alone
            with self.unmerged():
                return self.base_layer(x, *args, **kwargs)
        y: Tensor = self._own_layer()(x, *args, **kwargs)
        return y

    def _own_layer(self) -> Any:
        """The base layer with its own weight: itself, or a twin of a merged one, which other threads may be using."""
        return self.with_own_weight(self.base_layer)

    def with_own_weight(self, layer: nn.Module) -> nn.Module:
        """A frozen layer that has this one's weight, or where that is merged, a twin with the unmerged one."""
        if self.lora_unmerged_weight is None:
            return layer
        return frozen.twin_of(frozen.base_of(layer), weight=self.lora_unmerged_weight)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _combined_weight(
        self, names: list[str], dtype: torch.dtype | None, weights: Mapping[str, float] | None = None
    ) -> Tensor:
        """`W0 + sum_i (W'_i - W0)`, (out, in); None leaves it in float32 or better, else it is rounded as files are.

        It follows from the tensors themselves, not from cached gains, so it is right whoever wrote them; and it is
        computed in the blocks of rows in which `dude merge` computes it, so the bits are the same.
        """
        changes = [((weights or {}).get(name, 1.0), self.tensors(name), self.scaling[name]) for name in names]
        with self.unmerged(), no_autocast(self._base_device().type):
            base = self.target()
            weight = frozen.plain_weight(base)
            weight = frozen.dense_weight(base) if weight is None else weight
            return merged_weight(weight, changes, dtype, whole=frozen.is_transposed(base))

    def _base_weight(self) -> Tensor:
        with self.unmerged(), torch.no_grad():
            return frozen.dense_weight(self.target())

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Within: the base layer has its own weight, merged or not."""
        base: Any = self.target()
        if self.lora_unmerged_weight is None:
            yield
            return
        merged = base.weight
        self.give(self.lora_unmerged_weight)
        try:
            yield
        finally:
            self.give(merged)

    def _product_rows(self, rows: Tensor) -> Tensor:
        """The frozen layer without its bias, (tokens, in) -> (tokens, out)."""
        with torch.no_grad():
            return self._product(rows).T

    def _product(self, rows: Tensor) -> Tensor:
        with no_autocast(rows.device.type):
            base = self.target() if self.lora_unmerged_weight is None else self._own_layer()
            return frozen.product(base, rows)

    def unmerged_names(self) -> list[str]:
        """The active adapters that are not in the base layer's weight."""
        r, merged = self.r, self.merged_adapters
        return [name for name in self.active_adapters if name in r and name not in merged]

    def _names(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.r]

    def _follow_mode(self, adapter_name: str) -> None:
        """A new adapter's modules, its dropout above all, in the mode that the layer is in."""
        if self.training:
            return  # as new modules are
        for group in (*(getattr(self, name) for name in TRAINED), self.lora_dropout):
            if adapter_name in group:
                group[adapter_name].train(self.training)

    def _base_device(self) -> torch.device:
        return device_of(self.target())

    @override
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype, which would round the frozen start.
        target = device if device is not None else self._base_device()
        for name in (*TRAINED, *FROZEN):
            group = getattr(self, name)
            if adapter_name in group and not _is_meta(group[adapter_name]):
                group[adapter_name] = group[adapter_name].to(target)

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.refresh()
        super()._load_from_state_dict(*args, **kwargs)

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.refresh()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set the mode; averaged weights are often swapped in around a change of it, past torch's count."""
        self._mode_changes += mode != self.training
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = register(self)  # a copy is a layer of its own
        self.join(self._together)
        self.refresh()

    def __repr__(self) -> str:
        return "dude_peft." + super().__repr__()


class _Trained(nn.Module):
    """A trained tensor under the name ADAPTER.weight: TRL looks for `.ADAPTER.` in the names of parameters."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor)


class _Cached(NamedTuple):
    """Tensors, and the state of what they were computed from."""

    state: tuple[Any, ...]
    tensors: tuple[Tensor, ...]


def _is_meta(entry: Any) -> bool:
    tensors = [*entry.parameters(), *entry.buffers()] if isinstance(entry, nn.Module) else [entry]
    return any(tensor.is_meta for tensor in tensors)


def check_rank(method: Method, layer_name: str, shape: tuple[int, ...], r: int) -> None:
    """Refuse a rank above the smaller side of (out, in), or of (experts, out, in)."""
    out, in_ = shape[-2:]
    if method.ranked and r > min(out, in_):
        raise ConfigError(
            f"r={r} is more than layer '{layer_name}' (out {out}, in {in_}) can have; use r <= {min(out, in_)}, or "
            "give the layer a smaller rank with rank_pattern"
        )
