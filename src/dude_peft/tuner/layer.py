"""The adapted layer: a frozen layer, and for every adapter its frozen start, its trained deviations, its gain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import override

from dude_peft.artifact.effective import effective_weight
from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.stock import LayerTensors
from dude_peft.core.linear import FrozenProduct, adapted_linear
from dude_peft.core.magnitude import direction_change, gain, gain_slope, norm_change, row_norm
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.methods import Split
from dude_peft.methods.start import Start
from dude_peft.parents import fits
from dude_peft.tuner import frozen
from dude_peft.tuner.config import DudeConfig
from dude_peft.tuner.refresh import refresh_caches, register
from dude_peft.tuner.starts import start_of_layer
from dude_peft.tuner.steps import steps_taken

# On the layer, by adapter: parameters are trained, buffers are frozen. None of these names is a stock LoRA name, so
# that a raw state dict of ours cannot be taken for a stock adapter.
TRAINED = ("lora_dA", "lora_dB", "lora_dm")
FROZEN = ("lora_A0", "lora_B0", "lora_m0")
# Buffers that follow from the others: W0 A0^T (out, r), the gain (out,), its slope (out,).
_CACHED = ("_start_product", "_gain", "_slope")
# Layers of the Llama family whose output nothing behind them keeps for its backward: it is rotated, or added to the
# residual stream. A wrong guess costs memory, nothing else.
_OUTPUT_NOT_KEPT = ("q_proj", "k_proj", "o_proj", "down_proj")


@fits(uses=("adapter_layer_names", "other_param_names", "_disable_adapters"))
class DudeLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer with any number of adapters.

    Shapes: lora_dA (r, in), lora_dB (out, r), lora_dm (out,); lora_A0, lora_B0, lora_m0 likewise.
    """

    adapter_layer_names = TRAINED
    other_param_names = (*FROZEN, *_CACHED, "_fresh", "r", "lora_alpha", "scaling", "lora_dropout", "norm_gradient")

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.out_features, self.in_features = frozen.layer_shape(base_layer)
        self.lora_dA, self.lora_dB, self.lora_dm = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.lora_A0, self.lora_B0, self.lora_m0 = (BufferDict(persistent=True) for _ in FROZEN)
        self._start_product, self._gain, self._slope = (BufferDict(persistent=False) for _ in _CACHED)
        # What the caches were computed from (`_state_of`), by adapter; without an entry they are stale. W0 A0^T changes
        # with A0 alone, so it is computed only where there is no entry.
        self._fresh: dict[str, tuple[int, ...]] = {}
        self._number = register(self)
        self._output_kept = layer_name.rpartition(".")[2] not in _OUTPUT_NOT_KEPT
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.norm_gradient: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Any = None  # the base layer's own weight while a merged one is in its place
        # An opaque layer may rewrite its stored tensors (bitsandbytes packs them for inference): hashed before its use.
        opaque = frozen.plain_weight(base_layer) is None and self._base_device().type != "meta"
        self._opaque_print = frozen.layer_fingerprint(base_layer) if opaque else None
        self._fingerprint: tuple[tuple[int, int, str], TensorPrint] | None = None

    def add(self, adapter_name: str, config: DudeConfig, meta: bool = False, start: Start | None = None) -> None:
        """Add an adapter: split the base weight, set the deviations to zero.

        An adapter that is about to be loaded from a file gets zeros instead of a split (which is the base model too).

        Args:
            adapter_name: name.
            config: configuration; its patterns decide this layer's rank and alpha.
            meta: leave all tensors on the meta device, for loading with low_cpu_mem_usage.
            start: the start, where it has been computed (`tuner.starts`); None computes it here.

        Raises:
            ConfigError: the rank does not fit the layer.
            NumericsError: NaN or Inf in the base weight.
        """
        r, alpha = config.rank_and_alpha(self.layer_name)
        check_rank(self.layer_name, (self.out_features, self.in_features), r)
        spec, scaling = config.spec, config.spec.scaling(r, alpha)
        dtype = torch.promote_types(frozen.compute_dtype(self.get_base_layer()), torch.float32)
        device = torch.device("meta") if meta else self._base_device()

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        if config._loading is not None or meta:
            split = Split(zeros(r, self.in_features), zeros(self.out_features, r) if spec.principal else None)
            m0 = zeros(self.out_features)
        else:
            split, m0 = start or start_of_layer(self, self.layer_name, config)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, alpha
        self.scaling[adapter_name], self.norm_gradient[adapter_name] = scaling, config.norm_gradient
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        A = split.A.to(device=device, dtype=dtype)
        if split.B is None:
            self.lora_dA[adapter_name] = _Trained(A)
        else:
            self.lora_A0[adapter_name] = A.contiguous()
            self.lora_B0[adapter_name] = split.B.to(device=device, dtype=dtype).contiguous()
            self.lora_dA[adapter_name] = _Trained(zeros(r, self.in_features))
        self.lora_dB[adapter_name] = _Trained(zeros(self.out_features, r))
        if spec.magnitude:
            self.lora_m0[adapter_name] = m0.to(device=device, dtype=dtype)
            self.lora_dm[adapter_name] = _Trained(zeros(self.out_features))
            self._make_caches(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer under its active adapters, (*, in) -> (*, out).

        Several active adapters add their changes: y = base + sum_i (y_i - base).
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = self._names(self.active_adapters)
        if not names or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if len(names) == 1 and not args and not kwargs and frozen.is_dense(self.base_layer, x):
            return self._adapt(names[0], x, None)
        base_out: Tensor = self.base_layer(x, *args, **kwargs)
        y = self._adapt(names[0], x, base_out)
        for name in names[1:]:
            y = y + (self._adapt(name, x, base_out) - base_out)
        return y

    def effective_weight(self, adapter_names: list[str] | None = None) -> Tensor:
        """Merged weight `W0 + sum_i (W'_i - W0)`, (out, in), in float32 or better.

        Args:
            adapter_names: adapters to merge; None means the active ones.
        """
        self.refresh()  # what is merged or compared follows from the tensors themselves, whoever wrote them
        with torch.no_grad():
            W0 = self._base_weight()
            total = W0.clone()
            for name in self._names(self.active_adapters if adapter_names is None else adapter_names):
                total += effective_weight(W0, self.tensors(name), self.scaling[name], self.gain(name)) - W0
            return total

    def gain(self, adapter_name: str) -> Tensor | None:
        """Gain g = m / n of one adapter, (out,), float32 or better; None for methods without a magnitude.

        The values are computed once per optimizer step, in the first call behind it. With `norm_gradient="exact"` and
        gradients wanted, it is computed anew as a function of the deviations.
        """
        if adapter_name not in self.lora_dm:
            return None
        if self.norm_gradient[adapter_name] == "exact" and torch.is_grad_enabled():
            self._refresh(adapter_name)  # for W0 A0^T
            layer = self.tensors(adapter_name)
            assert layer.m0 is not None
            assert layer.dm is not None
            return gain(layer.m0, layer.dm, self._norm_change(adapter_name, layer), "exact")
        self._refresh(adapter_name)
        value: Tensor = self._gain[adapter_name]
        return value

    def refresh(self) -> None:
        """Take the cached gains as out of date; the next forward computes them.

        Optimizer steps, loading, moves and every in-place operation that torch counts are noticed without it. Only
        writes past torch's count, as `parameter.data.copy_(...)` in training mode, need the call.
        """
        self._fresh.clear()

    def refreshed(self, slot: int) -> list[Tensor]:
        """The caches of an adapter, up to date; called by compiled code, which knows the adapter by number."""
        name = self._slots[slot]
        self._refresh_if_stale(name)
        return self._caches(name)

    @property
    def _slots(self) -> list[str]:
        return list(self.lora_dm)

    def _refresh(self, adapter_name: str) -> None:
        # Neither compiled code nor fake tensors can be asked for values; both take the caches as an opaque operator's.
        if torch.compiler.is_compiling() or isinstance(self.lora_dm[adapter_name].weight, FakeTensor):
            refresh_caches(self._number, self._slots.index(adapter_name), self._caches(adapter_name))
        else:
            self._refresh_if_stale(adapter_name)

    def _refresh_if_stale(self, adapter_name: str) -> None:
        layer = self.tensors(adapter_name)
        state = _state_of(layer)
        if self._fresh.get(adapter_name) == state:
            return
        assert layer.m0 is not None
        assert layer.dm is not None
        value = self._gain[adapter_name]
        if value.device != layer.dm.device or value.dtype != torch.promote_types(layer.dm.dtype, torch.float32):
            self._make_caches(adapter_name)  # the model was moved, and buffers with it
        with torch.no_grad():
            if layer.A0 is not None and adapter_name not in self._fresh:
                self._start_product[adapter_name].copy_(self._product(layer.A0))
            q = self._norm_change(adapter_name, layer)
            self._gain[adapter_name].copy_(gain(layer.m0, layer.dm, q))
            self._slope[adapter_name].copy_(gain_slope(layer.m0, q))
        self._fresh[adapter_name] = state

    def _caches(self, adapter_name: str) -> list[Tensor]:
        return [getattr(self, name)[adapter_name] for name in _CACHED]

    def _make_caches(self, adapter_name: str) -> None:
        dm: Any = self.lora_dm[adapter_name].weight
        rank = self.r[adapter_name] if adapter_name in self.lora_A0 else 0
        # The gain is float32 or better, also beside a trained magnitude in half precision.
        dtype = torch.promote_types(dm.dtype, torch.float32)
        for name, shape in zip(_CACHED, ((rank,), (), ()), strict=True):
            zeros = torch.zeros(self.out_features, *shape, dtype=dtype, device=dm.device)
            getattr(self, name)[adapter_name] = zeros

    def movement(self, adapter_name: str) -> dict[str, Tensor]:
        """How far each output row has moved, (out,): `magnitude` |m - m0| / m0, and `direction` 1 - cos(V, W0).

        A method without a magnitude has the second alone; there V is the whole weight.
        """
        layer = self.tensors(adapter_name)
        dA = layer.dA.to(torch.promote_types(layer.dA.dtype, torch.float32))
        start = None if layer.A0 is None else self._product(layer.A0)
        m0 = row_norm(self._base_weight()) if layer.m0 is None else layer.m0
        change = (self._product(dA), start, dA, layer.dB.to(dA.dtype), layer.A0, layer.B0)
        found = {"direction": direction_change(*change, self.scaling[adapter_name], m0)}
        if layer.dm is not None:
            found["magnitude"] = torch.where(m0 > 0, layer.dm.abs() / m0, 0.0)
        return found

    def _norm_change(self, adapter_name: str, layer: LayerTensors) -> Tensor:
        with torch.autocast(layer.dA.device.type, enabled=False):
            dA = layer.dA.to(torch.promote_types(layer.dA.dtype, torch.float32))
            start = None if layer.A0 is None else self._start_product[adapter_name]
            scaling = self.scaling[adapter_name]
            return norm_change(self._product(dA), start, dA, layer.dB.to(dA.dtype), layer.A0, layer.B0, scaling)

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
        names = self._names(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        self.check_mergeable()
        base: Any = self.get_base_layer()
        original = self._unmerged_weight if self._unmerged_weight is not None else base.weight
        merged = self.effective_weight([*self.merged_adapters, *names]).to(original.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise NumericsError(
                f"the merged weight of '{self.layer_name}' overflows {original.dtype}; load the base in "
                f"float32 to merge"
            )
        stored = merged.T.contiguous() if frozen.is_transposed(base) else merged
        self._unmerged_weight = original
        base.weight = nn.Parameter(stored, requires_grad=False)
        self.merged_adapters.extend(names)

    def check_mergeable(self) -> None:
        """Refuse to merge into a weight that is no plain float matrix."""
        base = self.get_base_layer()
        if frozen.plain_weight(base) is None:
            raise ConfigError(
                f"'{self.layer_name}' is a {type(base).__name__}, its weight cannot take a merge; load the "
                f"base model unquantised, load the adapter there, and merge"
            )

    @override
    def unmerge(self) -> None:
        """Put the base layer's own weight back, the very tensor it was."""
        if self._unmerged_weight is not None:
            self.get_base_layer().weight = self._unmerged_weight
            self._unmerged_weight = None
        self.merged_adapters.clear()

    def tensors(self, adapter_name: str) -> LayerTensors:
        """State of one adapter; the tensors themselves, not copies."""

        def entry(group: Any) -> Any:
            if adapter_name not in group:
                return None
            found = group[adapter_name]
            return found.weight if isinstance(found, nn.Module) else found

        return LayerTensors(
            dA=entry(self.lora_dA),
            dB=entry(self.lora_dB),
            A0=entry(self.lora_A0),
            B0=entry(self.lora_B0),
            m0=entry(self.lora_m0),
            dm=entry(self.lora_dm),
        )

    def base_fingerprint(self) -> TensorPrint:
        """Fingerprint of the base weight (of the unmerged one), computed once while the weight stays the same."""
        if self._opaque_print is not None:
            return self._opaque_print
        base: Any = self.get_base_layer()
        weight = base.weight if self._unmerged_weight is None else self._unmerged_weight
        if self._fingerprint is not None and frozen.is_sharded(weight):
            return self._fingerprint[1]  # of the whole weight, taken before it was sharded
        key = (weight.data_ptr(), weight._version, f"{weight.dtype}{weight.device}")
        if self._fingerprint is None or self._fingerprint[0] != key:
            with self.unmerged():
                self._fingerprint = (key, frozen.layer_fingerprint(base))
        return self._fingerprint[1]

    @override
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the adapter to LoRA by its delta weight; not with a magnitude."""
        return adapter_name not in self.lora_dm

    def _adapt(self, name: str, x: Tensor, base_out: Tensor | None) -> Tensor:
        """Output under one adapter; without the frozen layer's output, its product is taken inside."""
        layer = self.tensors(name)
        base: Any = self.get_base_layer()
        g = self.gain(name)
        cached = g is not None and not g.requires_grad
        dm, slope = (layer.dm, self._slope[name]) if cached else (None, None)
        product = FrozenProduct(x, base.weight) if base_out is None else base_out
        bias = getattr(base, "bias", None) if g is not None or base_out is None else None
        factors = (layer.dA, layer.dB, layer.A0, layer.B0, g, bias, self.scaling[name], dm, slope)
        return adapted_linear(product, self.lora_dropout[name](x), *factors, self._output_kept)

    def _base_weight(self) -> Tensor:
        with self.unmerged(), torch.no_grad():
            return frozen.dense_weight(self.get_base_layer())

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Within: the base layer has its own weight, merged or not."""
        base: Any = self.get_base_layer()
        if self._unmerged_weight is None:
            yield
            return
        merged, base.weight = base.weight, self._unmerged_weight
        try:
            yield
        finally:
            base.weight = merged

    def _product(self, rows: Tensor) -> Tensor:
        with self.unmerged(), torch.autocast(rows.device.type, enabled=False):
            return frozen.product(self.get_base_layer(), rows)

    def _names(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.lora_dA]

    def _base_device(self) -> torch.device:
        base = self.get_base_layer()
        return next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))

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
        """Set the mode; averaged weights are often swapped in around it, so the gain is taken as stale."""
        self.refresh()
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = register(self)  # a copy is a layer of its own
        self.refresh()

    def __repr__(self) -> str:
        return "dude_peft." + super().__repr__()


class _Trained(nn.Module):
    """A trained tensor under the name ADAPTER.weight: TRL looks for `.ADAPTER.` in the names of parameters."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor)


def _state_of(layer: LayerTensors) -> tuple[int, ...]:
    """Changes when the trained tensors may have changed: with optimizer steps, in-place operations, new storages."""
    trained = [tensor for tensor in (layer.dA, layer.dB, layer.dm) if tensor is not None]
    versions = [0 if tensor.is_inference() else tensor._version for tensor in trained]
    return (steps_taken(), *versions, *(tensor.data_ptr() for tensor in trained))


def _is_meta(entry: Any) -> bool:
    tensor = entry.weight if isinstance(entry, nn.Module) else entry
    return bool(tensor.device.type == "meta")


def check_rank(layer_name: str, shape: tuple[int, int], r: int) -> None:
    """Refuse a rank above the layer's smaller side."""
    out, in_ = shape
    if r > min(out, in_):
        raise ConfigError(
            f"r={r} is more than layer '{layer_name}' (out {out}, in {in_}) can take; use r <= {min(out, in_)}, or "
            f"give it a smaller one with rank_pattern"
        )
