"""The kernels of core/kernels.py on a GPU: bandwidth against a copy's, time against the base product and plain torch.

    python benchmarks/gpu_kernels.py --json benchmarks/results/kernels-DEVICE.json

What a pass has to move is known: `compose` reads base and writes y, `spread` reads dy and kept and writes dv, and
`rows_product` reads W0. Its bandwidth is those bytes by its time; `of_copy` is that by the bandwidth of torch's own
copy of a (tokens, out) matrix in the same rounds. `ratio` is to the base product x W0^T, which is cuBLAS's. Inputs are
taken in turn from several copies, so that they come from memory, as in a model, and not from the last call's cache.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from measure import arguments, finish, interleaved, show

from dude_peft.core import compose as torch_path

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # (out, in)
RANKS = [16, 64]
SCALING = 2.0
REPEATS = 20  # calls in one measurement, so that the clock and the launches weigh little
COPIES = 4  # of every large input: more than the 50 MB of an H100's cache together


def cases(tokens: int, out: int, in_: int, rank: int) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """What is timed, and the bytes that each pass has to move."""
    from dude_peft.core import kernels

    k = 2 * rank

    def randn(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*size, device="cuda").to(dtype)

    def turned(*size: int) -> Callable[[], torch.Tensor]:
        return itertools.cycle([randn(*size) for _ in range(COPIES)]).__next__

    x, W0, base, dy, kept = turned(tokens, in_), turned(out, in_), *(turned(tokens, out) for _ in range(3))
    u, left, target = randn(tokens, k), randn(out, k), torch.empty(tokens, out, device="cuda", dtype=torch.bfloat16)
    gain, rows = 1 + 0.01 * randn(out, dtype=torch.float32), randn(rank, in_, dtype=torch.float32)
    torch_path.kernels_for = lambda tensor: None  # the torch path, on the same device
    timed = {
        "base product": lambda: x() @ W0().T,
        "copy": lambda: target.copy_(base()),
        "compose": lambda: kernels.compose(base(), u, left, gain, None, SCALING, None),
        "compose, torch": lambda: torch_path.compose(base(), u, left, gain, None, SCALING, None),
        "spread": lambda: kernels.spread(dy(), gain, kept(), left),
        "spread, torch": lambda: torch_path.spread(dy(), gain, kept(), left),
        "rows_product": lambda: kernels.rows_product(W0(), rows),
        "rows_product, torch": lambda: W0().float() @ rows.T,
        "LoRA's own pass (addmm)": lambda: torch.addmm(base(), u[:, :rank], left[:, :rank].T, alpha=SCALING),
    }
    pass_bytes = 2 * tokens * out
    moved = {"copy": 2 * pass_bytes, "compose": 2 * pass_bytes, "spread": 3 * pass_bytes, "rows_product": 2 * out * in_}
    return {name: repeated(call) for name, call in timed.items()}, moved


def repeated(call: Callable[[], Any]) -> Callable[[], None]:
    """The call, REPEATS times."""

    def run() -> None:
        for _ in range(REPEATS):
            call()

    return run


def main() -> None:
    """Measures every shape and rank, and prints one table each."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    settings = parser.parse_args()
    if not torch.cuda.is_available() or settings.device != "cuda":
        print("benchmarks/gpu_kernels.py needs a GPU: torch sees none here, or --device is not cuda", file=sys.stderr)
        raise SystemExit(2)
    results = []
    for out, in_ in SHAPES:
        for rank in RANKS:
            timed, moved = cases(settings.tokens, out, in_, rank)
            rows = interleaved(timed, settings.rounds, "cuda")
            for name, bytes_moved in moved.items():
                rows[name]["GB_per_second"] = REPEATS * bytes_moved / rows[name]["median_seconds"] / 1e9
            for name in moved:
                rows[name]["of_copy"] = rows[name]["GB_per_second"] / rows["copy"]["GB_per_second"]
            for row in rows.values():
                row["microseconds"] = row["median_seconds"] / REPEATS * 1e6
            columns = ["microseconds", "ratio", "ratio_low", "ratio_high", "GB_per_second", "of_copy"]
            show(f"{settings.tokens} tokens, W0 ({out}, {in_}), r = {rank}, bfloat16", rows, columns)
            results.append({"tokens": settings.tokens, "out": out, "in": in_, "rank": rank, "cases": rows})
    finish("kernels", settings, results, [f"seconds are of {REPEATS} calls"])


if __name__ == "__main__":
    main()
