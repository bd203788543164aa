"""The peak memory of one process of many, by torch's own tracker of FSDP2; a program of test_plan_processes.py."""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Reads what to measure from the first argument, and prints the parts of the peak, in bytes, as JSON."""
    import peft
    import torch
    import torch.distributed as dist
    import transformers
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dude_peft import DudeConfig
    from dude_peft.machine.sharding import _wrap

    asked = json.loads(sys.argv[1])
    dist.init_process_group("fake", rank=0, world_size=asked["processes"], store=FakeStore())
    settings = transformers.AutoConfig.from_pretrained(asked["folder"])
    base: Any = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    base.requires_grad_(False)
    base.config.use_cache = False
    if asked["checkpointing"]:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(base, DudeConfig(**asked["adapter"], task_type="CAUSAL_LM"))
    _wrap(model, init_device_mesh("cpu", (asked["processes"],)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)
    ids = torch.zeros(asked["rows"], asked["length"], dtype=torch.long)
    model.train()
    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs((ids,))
    with tracker:
        for number in range(2):  # the optimizer's states are there from the second step on
            if number:
                tracker.reset_mod_stats()
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
            loss.backward()
            optimizer.step()
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    print(json.dumps({str(getattr(kind, "name", kind)): int(size) for kind, size in found.items()}))


if __name__ == "__main__":
    main()
