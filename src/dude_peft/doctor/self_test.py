"""One adapted layer on this machine's device: its start is the base, and its gradients are numbers."""

from __future__ import annotations

import torch
from peft import inject_adapter_in_model
from torch import nn

from dude_peft.errors import NumericsError
from dude_peft.tuner import DudeConfig

_OUT, _IN, _TOKENS = 48, 64, 8


def self_test() -> None:
    """Adapts a random layer, runs it forward and backward, and takes a step.

    Raises:
        NumericsError: the start differs from the base layer, or a gradient is not finite or zero throughout.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(_IN, _OUT))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(_TOKENS, _IN, generator=generator)
    if device is not None:
        base, x = base.to(device), x.to(device)
    wanted = base(x).detach()
    adapted = inject_adapter_in_model(DudeConfig(r=4, target_modules=["0"]), base)
    got = adapted(x)
    if not torch.equal(got, wanted):
        distance = float((got.detach() - wanted).abs().max())
        raise NumericsError(f"self test: a new adapter changes the output by {distance:.2g}; report this")
    got.square().mean().backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    for name, gradient in trained.items():
        if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
            raise NumericsError(f"self test: the gradient of {name} is missing, zero or not finite; report this")
