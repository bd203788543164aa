"""What test_kernels.py runs in a process of its own, without the interpreter and without a GPU.

python tests/without_interpreter.py compile    every kernel, as it is launched, compiled for real GPUs
python tests/without_interpreter.py trace      torch.compile and fake tensors through the layer
"""

from __future__ import annotations

import sys

import torch
import triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from dude_peft.core import compose as torch_path
from dude_peft.core import kernels
from dude_peft.core.linear import adapted_linear
from dude_peft.core.magnitude import rows_product

# Shared memory that one program may have: A10 and RTX cards (8.6) have the least of CUDA's, all AMD cards the same.
TARGETS = [
    (GPUTarget("cuda", 80, 32), 99 << 10),
    (GPUTarget("cuda", 90, 32), 99 << 10),
    (GPUTarget("hip", "gfx942", 64), 64 << 10),
]


class Compiled:
    """Stands where a kernel stands, and compiles it with the arguments of the launch instead of launching it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert all(0 < n < 1 << 31 for n in grid)
        assert all(n < 1 << 16 for n in grid[1:])
        return self.launch

    def launch(self, *arguments, num_warps, num_stages, **constants):
        names = self.kernel.arg_names
        named = dict(zip(names, arguments, strict=False))
        # As the launcher does: a stride of 1 is known when compiling, and so is what 16 divides.
        constants |= {name: value for name, value in named.items() if type(value) is int and value == 1}
        signature = {n: "constexpr" if n in constants else mangle_type(named[n]) for n in names}
        for name, value in named.items():
            if type(value) is float:  # as torch.compile's launcher hands it over; Triton's own makes it float32
                signature[name] = "fp64"
        even = [i for i, n in enumerate(names) if n not in constants and divided_by_16(named[n])]
        source = ASTSource(
            self.kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in even},
        )
        for target, shared_bytes in TARGETS if constants["K"] == 32 else TARGETS[:1]:
            done = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
            assert done.metadata.shared <= shared_bytes, (self.kernel.__name__, target, done.metadata.shared)
            print(self.kernel.__name__, target.arch, constants.get("K"), done.metadata.shared)


def divided_by_16(value):
    return isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)


def check_compiling():
    kernels.wrap_triton = Compiled
    for dtype, k in [(torch.bfloat16, 32), (torch.float16, 256), (torch.float32, 32)]:
        base, u, left = (torch.empty(s, dtype=dtype) for s in [(4096, 4096), (4096, k), (4096, k)])
        gain, bias = torch.ones(4096), torch.empty(4096, dtype=dtype)
        kernels.compose(base, u, left, gain, bias, 1.0, dtype)
        kernels.spread(base, gain, base, left[:, :128].contiguous())
        if dtype != torch.float32:
            kernels.rows_product(base, torch.empty(k, 4096))


def check_tracing():
    torch_path.kernels_for = always
    triton.runtime.driver.set_active(NoDriver())

    def tensors(device):
        x = torch.empty(2, 70, 48, dtype=torch.bfloat16, device=device)
        W0 = torch.empty(64, 48, dtype=torch.bfloat16, device=device)
        dA, dB = torch.empty(4, 48, device=device), torch.empty(64, 4, device=device)
        gain, bias = torch.empty(64, device=device), torch.empty(64, dtype=torch.bfloat16, device=device)
        return x, W0, dA.requires_grad_(), dB.requires_grad_(), gain.requires_grad_(), bias

    def layer(x, W0, dA, dB, gain, bias):
        base = torch.nn.functional.linear(x, W0, bias)
        return adapted_linear(base, x, dA, dB, dA.detach(), dB.detach(), gain, bias, 0.5)

    with FakeTensorMode():
        arguments = tensors("cpu")
        y = layer(*arguments)
        assert (y.shape, y.dtype, y.device.type) == ((2, 70, 64), torch.bfloat16, "cpu")
        for leaf, grad in zip(arguments[2:5], torch.autograd.grad(y.sum(), arguments[2:5]), strict=True):
            assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)
        product = rows_product(arguments[1], arguments[2])
        assert (product.shape, product.dtype) == ((64, 4), torch.float32)
        (grad,) = torch.autograd.grad(product.sum(), arguments[2])
        assert grad.shape == (4, 48)

    for dynamic in (False, True):
        torch._dynamo.reset()
        graphs = {}
        backend = aot_autograd(fw_compiler=recorder(graphs, "forward"), bw_compiler=recorder(graphs, "backward"))
        compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
        arguments = tensors("cpu")
        y = compiled(*arguments)
        torch.autograd.grad(y.sum(), arguments[2:5])
        # These and no more: where the analysis of what a kernel writes fails, all its arguments count as written.
        written = {name: [sorted(n.kwargs["tensors_to_clone"]) for n in nodes] for name, nodes in graphs.items()}
        assert written == {"forward": [["kept_ptr", "y_ptr"]], "backward": [["dots_ptr", "dv_ptr", "parts_ptr"]]}
        print("dynamic" if dynamic else "static", written)


def always(tensor):
    from dude_peft.core import kernels  # within the traced code, as compose.kernels_for has it

    return kernels


class NoDriver:
    """Answers the one question of a driver that tracing asks."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def recorder(graphs, name):
    """A compiler that keeps the kernels of a graph; what it makes returns tensors of the right shapes."""

    def compiler(graph, inputs):
        graphs[name] = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        fakes = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in results]

        def run(*_):
            return [real(fake) for fake in fakes]

        return make_boxed_func(run)

    return compiler


def real(fake):
    if not isinstance(fake, torch.Tensor):
        return None if fake is None else int(fake)
    return torch.zeros([int(n) for n in fake.shape], dtype=fake.dtype)


if __name__ == "__main__":
    {"compile": check_compiling, "trace": check_tracing}[sys.argv[1]]()
