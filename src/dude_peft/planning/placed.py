"""Where `model.device_map` will put the frozen weights, and what of them the device that computes has at its peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers.integrations.accelerate import expand_device_map, get_balanced_memory, infer_auto_device_map

from dude_peft.config.schema import SHARED_OUT, RunConfig
from dude_peft.model.load import numbered
from dude_peft.planning.adapted import bare_model
from dude_peft.planning.bill import Bill
from dude_peft.planning.device import Device
from dude_peft.training.placement import check_map

_ENOUGH = 1 << 50


@dataclass(frozen=True)
class Placed:
    """A model on several devices."""

    weights: dict[str, int]
    """Device -> bytes of the frozen weights that are there between steps."""
    largest: int
    """Bytes of the largest part that is brought to where it computes."""

    @property
    def away(self) -> int:
        """Bytes that are brought for each forward: from the disk, and from the CPU where a GPU computes."""
        gpus = any(device not in ("cpu", "disk") for device in self.weights)
        return sum(size for device, size in self.weights.items() if device == "disk" or (gpus and device == "cpu"))

    def on(self, bill: Bill, *, checkpointing: bool) -> Bill:
        """The bill of a step whose offloaded weights are read again; without checkpointing they stay until backward."""
        if not checkpointing:
            return bill
        return replace(bill, weights=bill.weights - self.away, exchanged=bill.exchanged + self.largest)


def placed(config: RunConfig, settings: Any, where: str, device: Device) -> Placed | None:
    """How the run's model is spread; None for a model on one device.

    Args:
        config: of the run.
        settings: of the model; is not changed.
        where: from `locate`.
        device: that the plan is for; where it is another machine's, `auto` takes its memory, and a CPU that has room.

    Raises:
        ConfigError: the map names what the model does not have.
    """
    section = config.model
    if not section.is_hooked:
        return None
    model = bare_model(config, type(settings).from_dict(settings.to_dict()), where)
    check_map(model, section)
    if isinstance(section.device_map, Mapping):
        devices = {name: numbered(each) for name, each in section.device_map.items()}
    else:
        most: Any = {numbered(each): size for each, size in (section.max_memory or {}).items()} or None
        if most is None and not device.here:
            most = {0: device.memory, "cpu": _ENOUGH}
        split = getattr(model, "_no_split_modules", None)
        if section.device_map != SHARED_OUT[-1]:
            how: Any = {"no_split_module_classes": split, "low_zero": section.device_map == "balanced_low_0"}
            most = get_balanced_memory(model, max_memory=most, **how)
        devices = infer_auto_device_map(model, max_memory=most, no_split_module_classes=split)
    named = dict(model.named_parameters())  # buffers stay where it computes
    found = expand_device_map(devices, list(named))
    weights: dict[str, int] = {}
    parts: dict[str, int] = {}
    for name, tensor in named.items():
        place = str(found[name])
        weights[place] = weights.get(place, 0) + tensor.nbytes
        owner = name.rpartition(".")[0]
        parts[owner] = parts.get(owner, 0) + (tensor.nbytes if place in ("cpu", "disk") else 0)
    return Placed(weights, max(parts.values(), default=0))
