"""A finished `dude eval` against lm-evaluation-harness's own command on the merged model, question by question.

dude merge ADAPTER -o MERGED
dude eval ADAPTER --tasks gsm8k --data-dir DIR --limit 100 --batch-size 8 -o SCORES
python benchmarks/eval_samples.py SCORES MERGED

The command is `lm-eval run` in a process of its own, on the tasks in SCORES/tasks and the same questions. It prints how
many questions have the same hash, answer and score, and ends with 1 if one has not. With `--time` it also measures the
whole time of both commands on MERGED, each from its start to its end, in `--rounds` interleaved rounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import arguments, console, finish, interleaved, show

COLUMNS = ["questions", "same_hash", "same_answer", "same_score", "largest_logprob_difference", "score", "their_score"]


def main() -> None:
    """Runs the comparison."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("scores", type=Path, help="output folder of dude eval, of an adapter or a model")
    parser.add_argument("merged", type=Path, help="the same model as a plain checkpoint")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--time", action="store_true", help="measure the whole time of both commands")
    settings = parser.parse_args()
    results = json.loads((settings.scores / "results.json").read_text(encoding="utf-8"))
    ours = {_key(line): line for path in (settings.scores / "samples").glob("*.jsonl") for line in _lines(path)}
    times = None
    with tempfile.TemporaryDirectory() as folder:
        if settings.time:
            cases = {
                "lm-eval": lambda: _their_samples(settings, results["provenance"], ours, Path(folder)),
                "dude eval": lambda: _our_command(settings, results["provenance"]["options"]),
            }
            times = interleaved(cases, settings.rounds, settings.device, warm=False)
            show(
                "both commands, from start to end",
                times,
                ["median_seconds", "ratio", "ratio_low", "ratio_high", "cpu_ratio"],
            )
        theirs = _their_samples(settings, results["provenance"], ours, Path(folder), again=not settings.time)
    groups: dict[str, list[tuple[str, str, int]]] = {}
    for key in ours:
        groups.setdefault(f"{'mmlu' if key[0].startswith('mmlu') else key[0]}, {key[1]}", []).append(key)
    table = {name: _compared([(ours[key], theirs.get(key)) for key in keys]) for name, keys in groups.items()}
    show("dude eval against lm-eval's command", table, COLUMNS)
    finish("eval_samples", settings, {"table": table, "times": times, "provenance": _portable(results["provenance"])})
    if any(row["questions"] != row[column] for row in table.values() for column in COLUMNS[1:4]):
        console.print("some questions differ")
        sys.exit(1)


def _their_samples(
    settings: Any, provenance: dict[str, Any], ours: dict[Any, dict[str, Any]], folder: Path, again: bool = True
) -> dict[Any, dict[str, Any]]:
    items: dict[str, list[int]] = {}
    for task, _, document in ours:
        if document not in items.setdefault(task, []):
            items[task].append(document)
    shots = {provenance["tasks"][task]["num_fewshot"] for task in items}
    if len(shots) != 1:
        sys.exit("the tasks have different numbers of examples, which one command cannot set; evaluate them apart")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", settings.device]
    command += ["--model_args", f"pretrained={settings.merged},dtype=float32", "--tasks", ",".join(items)]
    command += ["--include_path", str(settings.scores / "tasks"), "--num_fewshot", str(shots.pop())]
    command += ["--batch_size", str(settings.batch_size), "--samples", json.dumps(items), "--log_samples"]
    command += ["--output_path", str(folder)]
    if provenance["options"]["chat"]:
        command += ["--apply_chat_template", "--fewshot_as_multiturn", "true"]
    if again:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        task = next(name for name in sorted(items, key=len, reverse=True) if path.name.startswith(f"samples_{name}_"))
        found |= {_key({"task": task, **line}): line for line in _lines(path)}
    return found


def _our_command(settings: Any, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "dude_peft", "eval", str(settings.merged), "-o", output]
        command += ["--tasks", ",".join(options["tasks"]), "--data-dir", options["data_dir"]]
        command += ["--batch-size", str(settings.batch_size), "--seed", str(options["seed"])]
        for name in ("limit", "num_fewshot"):
            if options[name] is not None:
                command += [f"--{name.replace('_', '-')}", str(options[name])]
        subprocess.run([*command, *(["--chat"] if options["chat"] else [])], check=True, stdout=subprocess.DEVNULL)


def _compared(pairs: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> dict[str, Any]:
    both = [(mine["model"], mine, other) for mine, other in pairs if other is not None]
    difference = 0.0
    same_answer = 0
    for model, _, other in both:
        if isinstance(model["filtered"][0], str):
            same_answer += model["responses"] == other["resps"] and model["filtered"] == other["filtered_resps"]
            continue
        one, two = ([float(choice[0]) for choice in found] for found in (model["filtered"], other["filtered_resps"]))
        difference = max(difference, *(abs(a - b) for a, b in zip(one, two, strict=True)))
        same_answer += one.index(max(one)) == two.index(max(two))
    metric = "acc" if "acc" in pairs[0][0]["model"] else "exact_match"
    return {
        "questions": len(pairs),
        "same_hash": sum(mine["doc_hash"] == other["doc_hash"] for _, mine, other in both),
        "same_answer": same_answer,
        "same_score": sum(model[metric] == other[metric] for model, _, other in both),
        "largest_logprob_difference": difference or None,
        "score": sum(model[metric] for model, _, _ in both) / max(len(both), 1),
        "their_score": sum(other[metric] for _, _, other in both) / max(len(both), 1),
    }


def _key(line: dict[str, Any]) -> tuple[str, str, int]:
    return line["task"], line["filter"], line["doc_id"]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _portable(provenance: dict[str, Any]) -> dict[str, Any]:
    """Without paths of this machine."""
    return {key: value for key, value in provenance.items() if key not in ("options", "base_model")}


if __name__ == "__main__":
    main()
