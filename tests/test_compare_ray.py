"""`dude compare --engine ray`: the loop that all engines share, what a node looks at, and real clusters."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from served import dude
from test_compare import grid, without_costs
from tiny import save_tiny, write_rows

import dude_peft
from dude_peft.comparison import ray_node
from dude_peft.comparison.cluster import Cluster
from dude_peft.comparison.engine import Ended, Engine, Start
from dude_peft.comparison.outcome import Comparison
from dude_peft.comparison.ray_client import Client
from dude_peft.errors import BusyError, ConfigError, ResourceError, StoppedError
from dude_peft.folder.lock import RunLock, is_locked, lock_text
from dude_peft.machine.environment import versions
from dude_peft.reporting.run import page_of

# --- the loop, in a place that only tells -------------------------------------------------------------------------


ENDLESS, STOPPED = -1000, 130


class Told:
    """A place and a folder at once: runs end as they are told to, one after another."""

    def __init__(self, ends: dict[str, list[int | None]], slots: int = 2) -> None:
        self.ends, self.slots = {name: list(codes) for name, codes in ends.items()}, slots
        self.running: list[str] = []
        self.started: list[str] = []
        self.most = 0
        self.signals: list[int] = []
        self.killed: list[str] = []
        self.failures: dict[str, str] = {}
        self.told: list[str] = []
        self.lines: list[str] = []

    def run(self) -> None:
        cells: Any = [SimpleNamespace(name=name) for name in self.ends]
        Engine(self, self, 1, lambda cell, running: self.told.append(cell.name), self.lines.append).run(cells)  # type: ignore[arg-type]

    # the folder
    def place(self, cell: Any) -> Path:
        return Path(f"{cell.name}.yaml")

    def log(self, cell: Any) -> Path:
        return Path(f"{cell.name}.log")

    def fail(self, cell: Any, reason: str) -> None:
        self.failures[cell.name] = reason

    # the place
    def room(self) -> int:
        return self.slots - len(self.running)

    def start(self, run: Start) -> None:
        self.running.append(run.name)
        self.started.append(run.name)
        self.most = max(self.most, len(self.running))

    def ended(self) -> list[Ended]:
        name = self.running[0]
        code = self.ends[name].pop(0)
        if code == ENDLESS:
            self.ends[name].append(code)
            self.running.append(self.running.pop(0))
            return []
        if code == STOPPED and not self.signals:  # it ends when it hears of a signal
            self.ends[name].insert(0, code)
            os.kill(os.getpid(), signal.SIGINT)
            return []
        self.running.pop(0)
        return [Ended(name, code, f"words of {name}")]

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.killed += self.running
        self.running.clear()


def test_runs_start_as_there_is_room_and_end_as_results():
    told = Told({"a": [0], "b": [5], "c": [1], "d": [6], "e": [0]})
    told.ends["d"] = [1]
    told.run()
    assert told.most == 2
    assert told.told == ["a", "b", "c", "d", "e"]
    assert told.failures == {"b": "diverged: words of b", "c": "words of c", "d": "words of d"}
    assert not told.killed


def test_a_run_that_is_killed_gets_a_second_try_and_a_lost_one_several():
    told = Told({"killed once": [-9, 0], "killed": [-9, -9], "lost": [None, None, None, None, 0]}, slots=1)
    told.run()
    assert told.started == ["killed once"] * 2 + ["killed"] * 2 + ["lost"] * 5
    assert told.failures == {"killed": "killed by SIGKILL, twice; was memory out?"}
    assert told.lines == ["run lost: words of lost; it goes on from its last checkpoint"] * 4


def test_memory_is_a_result_and_a_full_disk_is_none_whatever_its_folder_is_called(monkeypatch):
    words = {"memory": "training does not fit into memory at step 1", "disk": "/data/memory/x: No space left on device"}
    monkeypatch.setattr(Told, "ended", lambda self: [Ended(name := self.running.pop(), 6, words[name])])
    told = Told({"memory": [6]})
    told.run()
    assert told.failures == {"memory": words["memory"]}
    with pytest.raises(ResourceError, match="No space left"):
        Told({"disk": [6]}).run()


def test_a_signal_without_a_name_is_told_by_its_number():
    told = Told({"x": [-40, -40]})
    told.run()
    assert told.failures == {"x": "killed by signal 40, twice"}


@pytest.mark.parametrize(
    ("codes", "kind", "line"),
    [
        ([None] * 5, ResourceError, r"run x: lost with its machine 5 times \(words of x\); look at the machines"),
        ([2], ConfigError, "run x: words of x"),
        ([75], BusyError, "run x: words of x"),
        ([6], ResourceError, "run x: words of x"),
        ([143], StoppedError, "run x was stopped: words of x"),
    ],
)
def test_what_is_no_result_ends_the_comparison_and_every_run(codes, kind, line):
    told = Told({"x": codes, "other": [ENDLESS]})
    with pytest.raises(kind, match=line):
        told.run()
    assert told.killed == ["other"]
    assert not told.failures


def test_a_signal_is_passed_on_and_nothing_more_starts():
    told = Told({"x": [STOPPED], "y": [0], "z": [0]})
    with pytest.raises(StoppedError, match="stopped by Ctrl-C; run the same command again, it goes on"):
        told.run()
    assert told.signals == [signal.SIGINT]
    assert told.started == ["x", "y"]
    assert told.told == ["y"], "one that ended well meanwhile counts"
    assert not told.failures


# --- a node -------------------------------------------------------------------------------------------------------


@pytest.fixture
def facts(tmp_path) -> Any:
    lock = RunLock(tmp_path)
    yield {"folder": str(tmp_path), "lock": lock_text(tmp_path), "cwd": str(tmp_path), "versions": versions()}
    with contextlib.suppress(OSError):
        lock.release()


def test_a_node_that_shares_everything_fits(facts):
    assert ray_node.unfit(facts) is None


def test_a_node_that_does_not_see_the_folder_or_differs_says_so_in_a_line(facts, tmp_path):
    (tmp_path / "other").mkdir()
    assert "does not see output_dir" in ray_node.unfit({**facts, "folder": str(tmp_path / "other")})
    (tmp_path / "other/.dude-lock").write_text("process 1 on elsewhere")  # a folder of the same name, another one
    assert "does not see output_dir" in ray_node.unfit({**facts, "folder": str(tmp_path / "other")})
    (tmp_path / "other/.dude-lock").write_text(facts["lock"])  # seen, but its lock is not
    assert "not its lock" in ray_node.unfit({**facts, "folder": str(tmp_path / "other")})
    assert "start the command in a folder that all nodes share" in ray_node.unfit({**facts, "cwd": "/none"})
    assert "has torch 2" in ray_node.unfit({**facts, "versions": {**versions(), "torch": "1.0"}})


def test_of_two_tasks_of_one_run_the_second_waits_until_the_first_has_ended(facts, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(ray_node, "_LOCK_SECONDS", 0.05)
    monkeypatch.setattr(ray_node, "_node", lambda: "here")
    first = RunLock(tmp_path / "x")
    seen: list[bool] = []
    codes = iter([75, 0])  # the lock was taken by a third one in between

    def run(*_: object) -> int:
        seen.append(is_locked(tmp_path / "x"))
        return next(codes)

    monkeypatch.setattr(ray_node, "_run", run)
    threading.Timer(0.5, first.release).start()
    begun = time.monotonic()
    result = ray_node.run_cell(facts, {}, "x", str(tmp_path / "x.yaml"), str(tmp_path / "x.log"), 1)
    assert result == ("here", 0, "it left no word")
    assert time.monotonic() - begun >= 0.5
    assert seen == [False, False]


# --- the client, with a Ray that only writes down -----------------------------------------------------------------


class FakeRay:
    """As much of Ray as the client uses: tasks run when they are asked for, on the node of their strategy."""

    def __init__(self, *cpus: int) -> None:
        self.cluster = [
            {"NodeID": f"n{number}", "Alive": True, "Resources": {"CPU": float(count)},
             "NodeManagerHostname": f"host{number}", "NodeManagerAddress": "10.0.0.1"}
            for number, count in enumerate(cpus)
        ]  # fmt: skip
        self.submitted: list[dict[str, Any]] = []
        self.results: dict[str, list[Any]] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return self.cluster

    def remote(self, function: Any) -> Any:
        def options(**options: Any) -> Any:
            def submit(*arguments: Any) -> int:
                self.submitted.append({**options, "function": function.__name__, "arguments": arguments})
                return len(self.submitted) - 1

            return SimpleNamespace(remote=submit)

        return SimpleNamespace(options=options)

    def wait(self, tasks: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        return tasks, []

    def get(self, task: int, timeout: float | None = None) -> Any:
        what = self.submitted[task]
        node = getattr(what["scheduling_strategy"], "node_id", "any")
        result = self.results[what["arguments"][2] if what["function"] == "run_cell" else node].pop(0)
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def fake(monkeypatch) -> FakeRay:
    ray = FakeRay(2, 3, 0)
    names = ("TaskCancelledError", "OutOfMemoryError", "RayTaskError", "NodeDiedError")
    base = type("RayError", (Exception,), {})
    ray.exceptions = SimpleNamespace(RayError=base, **{name: type(name, (base,), {}) for name in names})
    strategy = SimpleNamespace()
    strategy.NodeAffinitySchedulingStrategy = lambda node, soft: SimpleNamespace(node_id=node, soft=soft)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace(scheduling_strategies=strategy))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategy)
    return ray


def test_nodes_are_looked_at_before_anything_runs_and_one_that_does_not_fit_is_named(fake):
    fake.results = {"n0": [None], "n1": [None]}
    assert Client().prepare({}, {}, None, None) == (1, 5)
    assert [what["scheduling_strategy"].node_id for what in fake.submitted] == ["n0", "n1"], "n2 holds no run"
    fake.results = {"n0": [None], "n1": ["does not see output_dir '/x'"]}
    with pytest.raises(ConfigError, match=r"--engine ray: node host1 \(10.0.0.1\) does not see output_dir '/x'"):
        Client().prepare({}, {}, None, None)
    assert all(what["function"] == "unfit" for what in fake.submitted)
    with pytest.raises(ConfigError, match="no node of the cluster has 4 CPUs"):
        Client().prepare({}, {}, None, 4)


def test_threads_and_slots_follow_from_the_cluster(fake):
    fake.results = {"n0": [None] * 9, "n1": [None] * 9}
    assert Client().prepare({}, {}, 2, None) == (2, 2), "5 CPUs for 2 runs: 2 threads; n0 and n1 hold one each"
    assert Client().prepare({}, {}, None, 3) == (3, 1)
    fake.cluster[1]["Resources"]["GPU"] = 2.0
    client = Client()
    assert client.prepare({}, {}, None, None) == (1, 2)
    client.start("x", "x.yaml", "x.log", 1)
    assert (fake.submitted[-1]["num_gpus"], fake.submitted[-1]["num_cpus"]) == (1, 0)


def test_ends_of_tasks_are_told_apart_and_a_node_that_came_late_and_does_not_fit_is_left_out(fake):
    wrong = fake.exceptions
    fake.results = {
        "n0": [None], "n1": [None], "well": [("n0", 0, "done")], "nan": [("n1", 5, "nan")],
        "memory": [wrong.OutOfMemoryError()], "lost": [wrong.NodeDiedError()],
        "cancelled": [wrong.TaskCancelledError()],
        "late": [("n3", None, "does not see output_dir '/x'"), ("n0", 0, "done")],
    }  # fmt: skip
    client = Client()
    client.prepare({"f": 1}, {"e": "2"}, None, None)
    fake.cluster.append({**fake.cluster[0], "NodeID": "n3", "NodeManagerHostname": "host3"})
    names = ["well", "nan", "memory", "lost", "cancelled", "late"]
    for name in names:
        client.start(name, f"{name}.yaml", f"{name}.log", 1)
    assert fake.submitted[-1]["arguments"] == ({"f": 1}, {"e": "2"}, "late", "late.yaml", "late.log", 1)
    assert {what["max_retries"] for what in fake.submitted} == {0}, "the comparison counts the tries, not Ray"
    over, _, warnings = client.poll()
    assert [(each.name, each.code) for each in over] == list(zip(names, [0, 5, -9, None, 130], strict=False))
    assert warnings == ["node host3 (10.0.0.1) does not see output_dir '/x'; nothing runs there"]
    assert fake.submitted[-1]["scheduling_strategy"].node_id in ("n0", "n1")
    over, _, warnings = client.poll()
    assert ([(each.name, each.code) for each in over], warnings) == ([("late", 0)], [])
    assert client._holds(fake.cluster[3]) == 0


def test_what_finds_no_fit_node_after_a_stop_does_not_start_again(fake):
    fake.results = {"n0": [None], "n1": [None], "late": [("n1", None, "does not see output_dir '/x'")]}
    fake.cancel = lambda task, force: None
    client = Client()
    client.prepare({}, {}, None, None)
    client.start("late", "late.yaml", "late.log", 1)
    client.cancel(False)
    over, _, _ = client.poll()
    assert [(each.name, each.code) for each in over] == [("late", 130)]
    assert len(fake.submitted) == 3


# --- what it refuses ----------------------------------------------------------------------------------------------


def with_ray(monkeypatch, there: bool) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there or None if name == "ray" else found(name))


def test_without_ray_one_line_tells_what_to_install(tmp_path, monkeypatch):
    with_ray(monkeypatch, False)
    with pytest.raises(ConfigError, match=r"^--engine ray needs Ray: pip install 'dude-peft\[ray\]'$"):
        dude_peft.compare(grid(output_dir=str(tmp_path / "out")), engine="ray")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"engine": "slurm"}, "--engine slurm: choose local or ray"),
        ({"address": "auto"}, "--address auto: only Ray has one; add --engine ray, or leave it out"),
        ({"jobs": 0}, "--jobs 0: give at least 1"),
        ({"engine": "ray", "collect": True}, "--engine ray: --collect runs nothing; leave one of them out"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, line):
    with pytest.raises(ConfigError, match=f"^{line}$"):
        dude_peft.compare(grid(output_dir=str(tmp_path / "out")), **options)


def test_the_command_refuses_an_engine_where_none_runs(tmp_path):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid()))
    for option in ("--dry-run", "--print-commands", "--collect"):
        done = dude("compare", "grid.yaml", "--engine", "ray", option, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "use no engine; leave it out" in done.stderr


def test_a_client_that_ends_is_one_line(monkeypatch):
    with_ray(monkeypatch, True)
    cluster = Cluster("10.0.0.1:6379", None, print)
    cluster._begin()
    cluster._child.kill()
    with pytest.raises(ResourceError, match=r"^--address 10.0.0.1:6379: the Ray cluster is lost \(its client ended\);"):
        cluster._call("poll")
    cluster.close()


# --- real clusters of two nodes on this machine -------------------------------------------------------------------


class Real:
    """A cluster of nodes of one CPU each, and a head without any."""

    def __init__(self, nodes: int = 2) -> None:
        cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install '.[ray]'")
        self.cluster = cluster_utils.Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False},
        )
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(nodes)]
        self.address = self.cluster.address

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def trains(self, node: Any) -> list[psutil.Process]:
        """The runs on a node."""
        return [each for each in self.raylet(node).children(recursive=True) if is_run(each)]

    def close(self) -> None:
        self.cluster.shutdown()


def is_run(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "train" in process.cmdline() and "dude_peft" in process.cmdline()
    return False


@pytest.fixture(scope="module")
def long_place(tmp_path_factory) -> Path:
    """Four runs that take seconds and keep checkpoints, and what they come to with --jobs 2."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    folder = tmp_path_factory.mktemp("ray")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 40)
    write_rows(folder / "test.jsonl", 8, start=100)
    settings = grid(methods=["lora"], learning_rates=[0.003, 1e30])
    settings["run"]["train"].update(max_steps=200, save_steps=10, logging_steps=50)
    (folder / "grid.yaml").write_text(yaml.safe_dump(settings))
    Command(folder, "local", "--jobs", "2").said()
    return folder


class Command(subprocess.Popen[str]):
    """`dude compare` in a process of its own, its words in a file."""

    def __init__(self, place: Path, out: str, *options: str) -> None:
        self.words = place / f"{out}.txt"
        with self.words.open("w") as file:
            super().__init__(
                [sys.executable, "-m", "dude_peft", "compare", "grid.yaml", "--output-dir", f"{out}/out", *options],
                cwd=place,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def said(self, code: int = 0) -> str:
        """What it wrote; it ended as it should, and Ray wrote nothing."""
        self.wait(500)
        text = self.words.read_text()
        assert self.returncode == code, text
        assert "raylet" not in text
        assert "ray." not in text
        return text


def until(condition: Any, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(psutil.Error):
            if found := condition():
                return found
        time.sleep(0.05)
    raise AssertionError("it did not come to this")


def begun(out: Path) -> list[str]:
    """The runs that have a checkpoint and no report."""
    folders = {path.parent.parent for path in out.glob("runs/*/checkpoints/step-*")}
    return [path.name for path in folders if not (path / "report.json").is_file()]


def page(out: Path, target: Path) -> bytes:
    """The page about a comparison, had its runs all taken the same time and memory."""
    found = Comparison.read(out)
    target.mkdir()
    dataclasses.replace(
        found,
        trials=tuple(dataclasses.replace(each, seconds=each.seconds and 1.0) for each in found.trials),
        finals=tuple(
            dataclasses.replace(each, seconds_per_step=1.0, peak_memory=1, start_seconds=1.0) for each in found.finals
        ),
    ).write(target)
    return page_of(target).read_bytes()


def resumed(out: Path) -> list[str]:
    return [path.stem for path in out.glob("runs/*.log") if "resuming from the checkpoint" in path.read_text()]


def running(real: Real, out: Path) -> tuple[Any, psutil.Process, str] | None:
    """A node with a run that has a checkpoint, the run's process and its name."""
    under_way = begun(out)
    for node in real.nodes:
        for process in real.trains(node):
            if (name := Path(process.cmdline()[-2]).stem) in under_way:
                return node, process, name
    return None


def taken(folder: Path) -> RunLock | None:
    """The lock of a run whose process is just ending."""
    with contextlib.suppress(BusyError):
        return RunLock(folder)
    return None


def over(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_node_is_killed_and_its_run_goes_on_elsewhere_to_the_same_numbers(long_place, tmp_path):
    """For a while somebody still has the run's folder, as where a node is not dead but cut off: nobody else starts."""
    real, out = Real(), long_place / "killed/out"
    try:
        command = Command(long_place, "killed", "--engine", "ray", "--address", real.address)
        node, process, name = until(lambda: running(real, out))
        real.cluster.remove_node(node, allow_graceful=False)
        until(lambda: over(process), 30)
        lock = until(lambda: taken(out / "runs" / name), 30)
        until(lambda: f"run {name}: its node" in command.words.read_text(), 60)
        (other,) = (each for each in real.nodes if each is not node)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(psutil.Error):
                assert name not in {Path(each.cmdline()[-1]).stem for each in real.trains(other)}, "two at once"
            time.sleep(0.2)
        lock.release()
        told = command.said()
    finally:
        real.close()
    assert f"run {name}: its node or its process on it is lost (NodeDiedError); it goes on from its last" in told
    assert name in resumed(out)
    assert without_costs(out) == without_costs(long_place / "local/out")
    assert page(out, tmp_path / "a") == page(long_place / "local/out", tmp_path / "b")


@pytest.mark.slow
def test_the_command_is_killed_or_stopped_and_no_run_runs_twice(long_place, tmp_path):
    """kill -9 of the comparison, Ctrl-C, then to the end."""
    real, out, ended = Real(), long_place / "again/out", list[dict[str, int]]()
    try:
        for number in (signal.SIGKILL, signal.SIGINT, None):
            command = Command(long_place, "again", "--engine", "ray", "--address", real.address)
            if number is not None:
                _, process, _ = until(lambda: running(real, out))
                command.send_signal(number)
                until(lambda: over(process), 60)  # noqa: B023
            told = command.said({signal.SIGKILL: -9, signal.SIGINT: 130, None: 0}[number])
            ended.append({path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/report.json")})
            if number == signal.SIGINT:
                line = "dude: error[interrupted]: stopped by Ctrl-C; run the same command again, it goes on\n"
                assert told.endswith(line)
    finally:
        real.close()
    assert ended[0].items() <= ended[1].items() <= ended[2].items(), "a run that had ended ran again"
    assert resumed(out)
    assert without_costs(out) == without_costs(long_place / "local/out")
    assert page(out, tmp_path / "a") == page(long_place / "local/out", tmp_path / "b")


@pytest.mark.slow
def test_a_node_without_the_folder_is_refused_before_a_run_and_left_out_when_it_comes_late(long_place):
    """A node whose mount of the place is another, empty one."""
    real, out, blind = Real(1), long_place / "unseen/out", None
    options = ("--engine", "ray", "--address", real.address)
    try:
        command = Command(long_place, "unseen", *options)
        until(lambda: running(real, out))
        blind = without_place(long_place, real.address)
        told = command.said()
        assert "does not see output_dir" in told
        assert "; nothing runs there" in told
        assert without_costs(out) == without_costs(long_place / "local/out")
        (line,) = Command(long_place, "refused", *options).said(2).splitlines()
        assert line.startswith("dude: error[config]: --engine ray: node ")
        assert "does not see output_dir" in line
        assert not (long_place / "refused/out").exists()
    finally:
        if blind is not None:
            for each in [*psutil.Process(blind.pid).children(recursive=True), blind]:
                each.kill()
        real.close()


def without_place(place: Path, address: str) -> subprocess.Popen[bytes]:
    """A node in a mount namespace of its own, in which the place is empty."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    ray = Path(sys.executable).parent / "ray"
    start = f"mount -t tmpfs none {place} && exec {ray} start --address={address} --num-cpus=4 --block"
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    )
