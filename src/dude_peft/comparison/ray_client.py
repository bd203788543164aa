"""The process of `dude compare` that knows Ray: it connects, submits runs as tasks, and tells how they end.

    python -m dude_peft.comparison.ray_client DESCRIPTOR

It answers calls on a socket until that closes. `cluster` starts it.
"""

from __future__ import annotations

import itertools
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from dude_peft.comparison.engine import Ended
from dude_peft.comparison.ray_node import run_cell, unfit
from dude_peft.errors import ConfigError, ResourceError
from dude_peft.show import shown

_CHECK_SECONDS = 90.0
_LOOK_SECONDS = 2.0
_NO_NODE_SECONDS = 30.0
_SIGKILL, _SIGINT = 9, 2


class Client:
    """What `cluster` calls, one method at a time."""

    def __init__(self) -> None:
        """Nothing is connected yet."""
        self._runs: dict[str, tuple[Any, ...]] = {}
        self._tasks: dict[Any, str] = {}
        self._unfit: set[str] = set()
        self._warnings: list[str] = []
        self._threads = 1
        self._gpu = False
        self._cancelled = False
        self._looked = 0.0
        self._slots = 0
        self._none_since: float | None = None
        self._turn = itertools.count()

    def connect(self, address: str) -> None:
        """Joins a cluster.

        Raises:
            ConfigError: none answers, or this installation does not fit it.
        """
        try:
            import ray

            # No configuration of logging: what Ray writes goes to a file that nobody has to read.
            own = {"include_dashboard": False} if address == "local" else {}
            ray.init(address=address, log_to_driver=False, namespace="dude", **own)
        except ImportError as error:
            raise ConfigError(f"--engine ray: Ray does not import ({_line(error)}); install it anew") from error
        except Exception as error:
            raise ConfigError(
                f"--address {shown(address)}: no Ray cluster answers there ({_line(error)}); start one with "
                "ray start --head, or give its address"
            ) from error

    def prepare(
        self, facts: dict[str, Any], environment: dict[str, str], jobs: int | None, threads: int | None
    ) -> tuple[int, int]:
        """Looks at the comparison's folder from every node that would run something; gives threads and slots.

        Raises:
            ConfigError: a node does not fit, or none holds a run.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._facts, self._environment = facts, environment
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._gpu = any(_count(node, "GPU") for node in nodes)
        self._threads = threads or self._default_threads(nodes, jobs)
        nodes = [node for node in nodes if self._holds(node)]
        if not nodes:
            need = "a GPU" if self._gpu else f"{self._threads} CPUs, as many as a run has threads"
            raise ConfigError(f"--engine ray: no node of the cluster has {need}; set OMP_NUM_THREADS, or add a node")
        look = ray.remote(unfit)
        asked = [
            look.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(facts)
            for node in nodes
        ]
        end = time.monotonic() + _CHECK_SECONDS
        for node, task in zip(nodes, asked, strict=True):
            try:
                line = ray.get(task, timeout=max(0.0, end - time.monotonic()))
            except Exception as error:
                line = f"does not answer, or has no dude-peft ({_line(error)})"
            if line is not None:
                raise ConfigError(f"--engine ray: node {_name(node)} {line}")
        return self._threads, self._room()

    def start(self, name: str, config: str, log: str, threads: int) -> None:
        """Submits a run."""
        self._runs[name] = (name, config, log, threads)
        self._submit(name)

    def poll(self) -> tuple[list[Ended], int, list[str]]:
        """The runs that have ended, how many the cluster holds, and what the user has to hear."""
        import ray

        over = []
        if self._tasks:
            done, _ = ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
            for task in done:
                name = self._tasks.pop(task)
                if (ended := self._result(name, task)) is not None:
                    del self._runs[name]
                    over.append(ended)
        warnings, self._warnings = self._warnings, []
        return over, self._room(), warnings

    def cancel(self, force: bool) -> None:
        """Lets the runs save their checkpoints and end, or ends them at once."""
        import ray

        self._cancelled = True
        for task in self._tasks:
            ray.cancel(task, force=force)

    def _submit(self, name: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy: Any = "SPREAD"
        if self._unfit:  # Ray would choose them too
            nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and self._holds(node)]
            if nodes:
                strategy = NodeAffinitySchedulingStrategy(nodes[next(self._turn) % len(nodes)], soft=True)
        resources = {"num_gpus": 1, "num_cpus": 0} if self._gpu else {"num_cpus": self._threads}
        # Retries are the comparison's, which counts them by what ended the run.
        task = ray.remote(run_cell).options(
            name=f"dude {name}", max_retries=0, scheduling_strategy=strategy, **resources
        )
        self._tasks[task.remote(self._facts, self._environment, *self._runs[name])] = name

    def _result(self, name: str, task: Any) -> Ended | None:
        """How a run has ended; None where its node did not fit, and it waits for another one."""
        import ray
        from ray import exceptions

        try:
            node, code, words = ray.get(task)
        except exceptions.TaskCancelledError:
            return Ended(name, 128 + _SIGINT, "it was cancelled")
        except exceptions.OutOfMemoryError:
            return Ended(name, -_SIGKILL, "Ray killed it, because memory was out")
        except exceptions.RayTaskError as error:
            return Ended(name, ResourceError.exit_code, f"its task failed: {_line(error.cause or error)}")
        except exceptions.RayError as error:
            return Ended(name, None, f"its node or its process on it is lost ({type(error).__name__})")
        if code is not None:
            return Ended(name, code, words)
        if node not in self._unfit:
            self._unfit.add(node)
            known = [each for each in ray.nodes() if each["NodeID"] == node]
            named = _name(known[0]) if known else shown(node)
            self._warnings.append(f"node {named} {words}; nothing runs there")
        if self._cancelled:  # it had not begun, and nothing begins any more
            return Ended(name, 128 + _SIGINT, "it was cancelled")
        self._submit(name)
        return None

    def _room(self) -> int:
        """How many runs the cluster holds."""
        import ray

        now = time.monotonic()
        if now < self._looked + _LOOK_SECONDS:
            return self._slots
        self._looked = now
        self._slots = sum(self._holds(node) for node in ray.nodes() if node["Alive"])
        if self._slots:
            self._none_since = None
        elif self._none_since is None:
            self._none_since = now
        elif now > self._none_since + _NO_NODE_SECONDS:
            self._none_since = float("inf")  # said once
            self._warnings.append("no node of the cluster holds a run now; waiting for one")
        return self._slots

    def _holds(self, node: dict[str, Any]) -> int:
        """How many runs a node holds."""
        if node["NodeID"] in self._unfit:
            return 0
        return _count(node, "GPU") if self._gpu else _count(node, "CPU") // self._threads

    def _default_threads(self, nodes: list[dict[str, Any]], jobs: int | None) -> int:
        """A GPU's share of its node's CPUs; without GPUs a job's share of the cluster's, or one."""
        if self._gpu:
            shares = [_count(node, "CPU") // _count(node, "GPU") for node in nodes if _count(node, "GPU")]
            return max(1, min(shares))
        cpus = [_count(node, "CPU") for node in nodes]
        return 1 if jobs is None else max(1, min(sum(cpus) // jobs, max(cpus, default=1)))


def _count(node: dict[str, Any], resource: str) -> int:
    return int(node["Resources"].get(resource, 0))


def _name(node: dict[str, Any]) -> str:
    return shown(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})")


def _line(error: BaseException) -> str:
    """The last line of an error: Ray's begin with the traceback of another machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[-1] if lines else type(error).__name__, 200)


def serve(calls: Connection) -> None:
    """Answers calls until the other side is gone."""
    client = Client()
    while True:
        try:
            name, arguments = calls.recv()
        except EOFError:
            return
        try:
            answer = "ok", getattr(client, name)(*arguments)
        except ConfigError as error:
            answer = "config", str(error)
        except Exception as error:
            answer = "resource", f"--engine ray: {name}: {_line(error)}"
        calls.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
