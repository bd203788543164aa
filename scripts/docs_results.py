"""Tables of the documentation, each made from records in benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
_GSM8K = {  # the two numbers of a rate: runs of an earlier and of a later code
    "dude": {"1e-4": ["2026-11-24"], "3e-4": ["2026-11-22", "2026-11-25"], "1e-3": ["2026-11-24"], "3e-3": []},
    "lora": {
        "1e-4": ["2026-11-24"],
        "3e-4": ["2026-11-22"],
        "1e-3": ["2026-11-22", "2026-11-25"],
        "3e-3": ["2026-11-25"],
    },
}


def _record(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_RESULTS / f"{name}.json").read_text("utf-8"))
    return content


def _link(name: str, text: str = "record") -> str:
    return f"[{text}](../benchmarks/results/{name}.json)"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:.1f} % ({max(0.0, 100 * interval[0]):.1f} to {100 * interval[1]:.1f})"


def _ratio(found: dict[str, Any]) -> str:
    return f"{found['ratio']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"


def quickstart() -> str:
    rows, titles = [], {"2026-11-22": "first code", "2026-11-28": "later code, another order of rows"}
    for day, title in titles.items():
        name = f"{day}-quickstart-dude"
        run = _record(name)
        cells = []
        for score in (run["before"], run["after"]):
            cells += [f"{score['loss']:.3f}", _share(score["right"] / score["rows"], score["interval"])]
        rows.append([f"{title} ({_link(name)})", *cells])
    head = f"dude, {run['steps']} steps of 8 rows, {run['after']['rows']} held-out problems, one seed"
    return _table([head, "loss before", "exact match, 95 %", "loss after", "exact match, 95 %"], rows)


def gsm8k_sweep() -> str:
    rates = list(_GSM8K["dude"])
    rows, before = [], 0.0
    for method, runs in _GSM8K.items():
        cells = []
        for rate in rates:
            found = []
            for day in runs[rate]:
                name = f"{day}-gsm8k-{method}-{rate}"
                run = _record(name)
                before = run["before"]["loss"]
                found.append(_link(name, f"{run['after']['loss']:.3f}"))
            cells.append(" · ".join(found))
        rows.append([method, *cells])
    return _table([f"learning rate ({before:.3f} before)", *rates], rows)


def gsm8k_eval() -> str:
    names = {"lora": "2026-11-25-gsm8k-eval-lora", "dude": "2026-11-25-gsm8k-eval-dude"}
    records = {method: _record(name) for method, name in names.items()}
    rows = []
    for place, measure in enumerate(records["dude"]["measures"]):
        found = [records[method]["measures"][place] for method in names]
        base = measure["base"]
        rows.append(
            [measure["filter"], _share(base["value"], base["interval"])]
            + [_share(m["model"]["value"], m["model"]["interval"]) for m in found]
        )
        differences = []
        for compared in (m["comparison"] for m in found):
            difference, low, high = (100 * value for value in (compared["difference"], *compared["interval"]))
            differences.append(f"{difference:+.1f} ({low:+.1f} to {high:+.1f}), p = {compared['p_value']:.2g}")
        rows.append(["its difference to the base, points; McNemar", "", *differences])
    unstopped = [records["dude"]["counts"]["base"], *(records[method]["counts"]["model"] for method in names)]
    rows.append(["answers that never stopped", *(str(counts["unstopped"]["gsm8k"]) for counts in unstopped)])
    measure = records["dude"]["measures"][0]
    items = f"{measure['items']} of {measure['of']:,} questions"
    heads = [f"{method}, {rate} ({_link(names[method])})" for method, rate in (("lora", "3e-3"), ("dude", "3e-4"))]
    return _table([f"GSM8K, {items}", "base", *heads], rows)


def forgetting() -> str:
    names = {"lora, 3e-3": "2026-11-25-text-eval-lora", "dude, 3e-4": "2026-11-25-mmlu-eval-dude"}
    rows = []
    for title, name in names.items():
        text = _record(name)["text"]
        low, high = text["comparison"]["interval"]
        change = f"{text['comparison']['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        near, far = text["kl_interval"]
        kl = f"{text['kl']:.3f} ({near:.3f} to {far:.3f})"
        rows.append([f"{title} ({_link(name)})", f"{text['base_loss']:.3f}", f"{text['loss']:.3f}", change, kl])
    return _table(["tiny Shakespeare, nats a token", "base loss", "loss", "difference", "KL to the base"], rows)


def mmlu() -> str:
    name = "2026-11-25-mmlu-eval-dude"
    measure = _record(name)["measures"][0]
    cells = [_share(measure[who]["value"], measure[who]["interval"]) for who in ("base", "model")]
    head = f"MMLU, 5 examples, {measure['items']} of {measure['of']:,} questions ({_link(name)})"
    return _table([head, "base", "dude, 3e-4"], [["accuracy", *cells]])


def exports() -> str:
    name, small = "2026-11-24-export-run", "2026-11-24-export"
    run, models = _record(name)["results"], _record(small)["results"]
    worst = {
        dtype: {
            export: max(found[export]["share"] for title, found in models.items() if f", {dtype}," in title)
            for export in next(iter(models.values()))
        }
        for dtype in ("float32", "bfloat16")
    }
    rows = []
    for export in ("merged", "merged, bfloat16", "peft", "lora:8", "lora:16", "lora:32", "lora:64"):
        found = run.get(export, {})
        shares = [f"{worst[d][f'DuDe, {export}']:.2g}" if f"DuDe, {export}" in worst[d] else "" for d in worst]
        rows.append(
            [
                f"`{export}`",
                f"{found['kl']:.1e}" if found else "",
                f"{found['held_out_loss']:.3f}" if found else "",
                f"{100 * found['energy']:.1f} %" if "energy" in found else "",
                *shares,
            ]
        )
    for export in ("PEFT, converted to a LoRA", "PEFT, save_as_lora 64"):
        rows.append([export, "", "", "", *(f"{worst[d][export]:.2g}" if export in worst[d] else "" for d in worst)])
    live = run["live adapter"]["held_out_loss"]
    header = [
        "export",
        f"KL, a run ({_link(name)})",
        f"held-out loss (live {live:.3f})",
        "energy of the change",
        f"share lost, float32 ({_link(small)})",
        "share lost, bfloat16",
    ]
    return _table(header, rows)


def quantised() -> str:
    name = "2026-11-24-quantised-smollm2"
    found = _record(name)["results"]
    rows = []
    for kind in ("nf4", "int8"):
        ranks = [found[f"{kind}, r = {r}"] for r in (16, 64, 128)]
        error = [f"{100 * f['residual']:.2f} ({100 * f['residual_worst']:.2f})" for f in ranks]
        plain = f"{100 * ranks[0]['plain']:.2f} ({100 * ranks[0]['plain_worst']:.2f})"
        rows.append([f"{kind}, error in %, mean layer (worst)", plain, *error])
        rows.append([f"{kind}, KL, nats a token", f"{ranks[0]['kl_plain']:.3f}", *(f"{f['kl']:.3f}" for f in ranks)])
    return _table([f"SmolLM2-135M ({_link(name)})", "weights quantised", "residual, r = 16", "r = 64", "r = 128"], rows)


def objectives() -> str:
    rows = []
    for objective, what in (("dpo", "pairs whose better answer has the larger reward"), ("grpo", "right answers")):
        name = f"2026-11-30-{objective}-smollm2"
        results = _record(name)["results"]
        before = results["table"]["before"]
        for case, runs in results["runs"].items():
            after = results["table"][case]
            counts = ", ".join(f"{run['right']:.0f}" for run in runs)
            began = ", ".join(f"{run['right_before']:.0f}" for run in runs) if before["measure"] else "none"
            rows.append(
                [
                    f"{case} ({_link(name)})",
                    f"{what}, of {runs[0]['asked']:.0f}",
                    began,
                    counts,
                    f"{100 * after['measure']:.0f} % ± {100 * after['measure_half_width']:.0f}",
                    f"{after['general'] - before['general']:+.3f}",
                    f"{after['kl']:.3f} ± {after['kl_half_width']:.3f}",
                ]
            )
    header = ["SmolLM2-135M, three seeds", "measure", "before, by seed", "after, by seed", "after, 95 %"]
    return _table([*header, "general loss", "KL to the base"], rows)


def equal_compute() -> str:
    name = "2026-11-30-equal-compute-smollm2"
    results = _record(name)["results"]
    before, rows = results["table"]["before"], []
    for case, runs in results["runs"].items():
        after = results["table"][case]
        rows.append(
            [
                case.partition(",")[0],
                ", ".join(f"{run['right_before']:.0f}" for run in runs),
                ", ".join(f"{run['right']:.0f}" for run in runs),
                f"{100 * after['measure']:.0f} % ± {100 * after['measure_half_width']:.0f}",
                f"{after['general'] - before['general']:+.3f}",
                f"{after['kl']:.3f} ± {after['kl_half_width']:.3f}",
                f"{after['passes']:,.0f}",
            ]
        )
    head = [f"objective ({_link(name)})", f"right of {runs[0]['asked']:.0f} before, by seed"]
    return _table([*head, "after, by seed", "after, 95 %", "general loss", "KL to the start", "passes"], rows)


def qlora() -> str:
    name = "2026-11-30-qlora"
    found = _record(name)["results"]
    rows = []
    for base, means in found["table"].items():
        losses = [f"{means[key]:.3f} ± {means[f'{key}_half_width']:.3f}" for key in ("before", "loss")]
        used = found["commands"].get(base)
        over = "" if used is None else f"{means['over']:+.3f} ± {means['over_half_width']:.3f}"
        same = "" if used is None else "yes" if used["same_bits_after_kill"] else "no"
        rows.append([base, *losses, over, same])
    head = f"base of SmolLM2-135M ({_link(name)})"
    return _table(
        [head, "loss before", "loss after", "over the base as it is", "killed and resumed: the same bits"], rows
    )


def mol() -> str:
    name = "2026-11-25-mol"
    rows = []
    for title, found in _record(name)["results"]["table"].items():
        sign = "+" if title == "mol - sft" else ""
        cells = [f"{found[k]:{sign}.3f} ± {found[k + '_half_width']:.3f}" for k in ("domain", "general", "kl")]
        rows.append([title, *cells])
    header = [f"nats a token, 3 seeds, mean ± half of the 95 % interval ({_link(name)})"]
    return _table([*header, "domain loss", "general loss", "KL to the base, general rows"], rows)


def family() -> str:
    return _compared("2026-11-29-family")


def stories() -> str:
    return _compared("2026-11-29-compare-stories260k")


def tinystories() -> str:
    return _compared("2026-11-29-compare-tinystories-656k")


def boolq() -> str:
    return _compared("2026-11-29-compare-smollm2-boolq")


def word_problems() -> str:
    return _compared("2026-11-30-compare-smollm2-word-problems")


def _compared(name: str) -> str:
    found = _record(name)["results"]
    rows = []
    for method, each in found["methods"].items():
        low, high = each["interval"]
        rows.append(
            [
                f"`{method}`",
                f"{each['learning_rate']:.2g}",
                f"{each['loss']:.3f} ({low:.3f} to {high:.3f})",
                f"{each['failed_trials']} of {each['trials']}",
                f"{each['trained_parameters']:,.0f}",
            ]
        )
    header = f"method ({_link(name)})"
    return _table([header, "best rate", "test loss, 95 %", "trials that failed", "trained parameters"], rows)


def method_costs() -> str:
    name = "2026-11-29-methods"
    (rows,) = _record(name)["results"].values()
    lines = [
        [
            method if method == "PEFT LoRA" else f"`{method}`",
            _ratio(found),
            f"{found['peak_ratio']:.2f}",
            f"{found['start_seconds']:.2f} s",
            f"{found['trained_parameters']:,.0f}",
            f"{found['file_mib']:.1f} MiB",
        ]
        for method, found in rows.items()
    ]
    return _table([f"method ({_link(name)})", "step", "peak memory", "start", "trained parameters", "file"], lines)


def budget() -> str:
    name = "2026-11-29-budget-smollm2"
    rows = []
    for rule, found in _record(name)["results"]["table"].items():
        to_uniform = "" if rule == "uniform" else f"{found['to_uniform']:+.4f} +- {found['to_uniform_half_width']:.4f}"
        rows.append(
            [f"`{rule}`", f"{found['parameters']:,.0f}", str(found["layers"]), f"{found['loss']:.3f}", to_uniform]
        )
    header = f"rule ({_link(name)})"
    return _table([header, "parameters", "layers", "held-out loss", "over uniform, 95 %"], rows)


def step_model() -> str:
    subjects = ["DuDe", "our lora", "our pissa", "PEFT DoRA", "PEFT PiSSA + DoRA", "frozen base"]
    rows = []
    for record, calls in (
        ("2026-11-28-step-model-float32", "Trainer's calls"),
        ("2026-11-28-step-model-bfloat16", "Trainer's calls"),
        ("2026-11-28-step-model-bfloat16-accumulated", "Trainer's calls"),
        ("2026-11-24-step-model-float32", "a hand loop, earlier code"),
    ):
        for title, found in _record(record)["results"].items():
            _, dtype, tokens, _ = title.split(", ")
            cells = [_ratio(found["rows"][one]) if one in found["rows"] else "" for one in subjects]
            rows.append([f"{dtype}, {tokens}, {calls} ({_link(record)})", *cells])
    return _table(["97.5 M Llama", *subjects], rows)


def step_layer() -> str:
    names = ("2026-11-24-step-layer-bfloat16-r16", "2026-11-24-step-layer-bfloat16-r64-r128")
    cells: dict[tuple[str, str], str] = {}
    for name in names:
        for title, found in _record(name)["results"].items():
            shape, _, tokens, rank = title.split(", ")
            ours, theirs = found["rows"]["DuDe"]["ratio"], found["rows"]["PEFT DoRA"]["ratio"]
            cells[shape.removeprefix("linear "), f"{rank}, {tokens}"] = f"{ours:.2f} · {theirs:.1f}"
    columns = list(dict.fromkeys(column for _, column in cells))
    shapes = list(dict.fromkeys(shape for shape, _ in cells))
    rows = [[shape, *(cells.get((shape, column), "") for column in columns)] for shape in shapes]
    return _table([f"out x in ({_link(names[0], 'r = 16')}, {_link(names[1], 'r = 64, 128')})", *columns], rows)


def memory() -> str:
    name = "2026-11-30-memory"
    rows = []
    for title, found in _record(name)["results"].items():
        cells = [
            f"{found[one]['peak_mib']:.0f} MiB, {found[one]['peak_ratio']:.2f}"
            for one in ("PEFT LoRA", "DuDe", "PEFT DoRA", "PEFT PiSSA + DoRA")
        ]
        rows.append([title, *cells])
    return _table(
        [f"peak of live activations, ratio ({_link(name)})", "PEFT LoRA", "DuDe", "PEFT DoRA", "PEFT PiSSA + DoRA"],
        rows,
    )


def host_memory() -> str:
    return _host_memory("2026-11-29-host-memory")


def host_memory_load() -> str:
    """What of the peak is there before the first step."""
    name = "2026-11-30-host-memory"
    rows = [
        [
            title,
            f"{found['load_mb']:,.0f} MB",
            f"{found['load_models']:.2f}",
            f"{found['peak_mb']:,.0f} MB",
            f"{found['models']:.2f}",
            f"{found['planned_models']:.2f}",
        ]
        for title, found in _record(name)["results"].items()
    ]
    head = [
        f"host memory of all processes ({_link(name)})",
        "until the first step",
        "models above the programs",
        "peak",
    ]
    return _table([*head, "models above the programs", "`dude plan`"], rows)


def host_memory_ddp() -> str:
    return _host_memory("2026-11-30-host-memory-ddp")


def host_memory_nf4() -> str:
    return _host_memory("2026-11-30-host-memory-nf4")


def _host_memory(name: str) -> str:
    """With what `dude plan` told, where the record has that."""
    results = _record(name)["results"]
    planned = all("planned_models" in found for found in results.values())
    rows = [
        [
            title,
            f"{found['peak_mb']:,.0f} MB",
            f"{found['ratio']:.2f}",
            f"{found['own_mb']:,.0f} MB",
            f"{found['models']:.2f}",
            *([f"{found['planned_models']:.2f}"] if planned else []),
            "yes" if found["same_losses"] else "no",
        ]
        for title, found in results.items()
    ]
    head = [f"host memory of all processes ({_link(name)})", "peak", "over one process", "programs alone"]
    return _table([*head, "models above that", *(["`dude plan`"] if planned else []), "same losses"], rows)


def _objective_speeds() -> list[list[str]]:
    """Speed and memory against TRL, of the records that are there."""
    rows = []
    for path in sorted(_RESULTS.glob("*-objective-speed-*.json")):
        record = _record(path.stem)
        asked, found = record["settings"], record["results"]
        ours = {method: found[f"dude train, {method}"] for method in ("dude", "lora")}
        grpo = asked["objective"] == "grpo"
        rival, part = ("GRPOTrainer", "drawing and learning") if grpo else ("DPOTrainer", "the reference in every step")
        if asked.get("precompute"):
            part = "the reference measured before"
        model = "SmolLM2-135M" if "smollm2" in asked["model"] else asked["model"]
        against = (
            f"`objective: {asked['objective']}`, {part}, over TRL's {rival} with PEFT LoRA, {model}, {asked['dtype']}"
        )
        told = ", ".join(f"{method} {_ratio(each)}" for method, each in ours.items())
        rows.append([f"tokens a second of {against} ({_link(path.stem)})", told])
        told = ", ".join(f"{method} {each['peak_ratio']:.2f}" for method, each in ours.items())
        rows.append([f"peak memory beyond the base model's weights, the same ({_link(path.stem)})", told])
    return rows


def costs() -> str:
    throughput = _record("2026-11-25-throughput")["results"]
    grpo = _record("2026-11-29-grpo-stories260k")["results"]
    init = _record("2026-11-30-init")["results"]
    merge_file = _record("2026-11-24-merge-file")["results"]
    rows = [
        [
            f"tokens a second of `dude train`, packed, over TRL's SFTTrainer with PEFT LoRA, packed, SmolLM2-135M "
            f"({_link('2026-11-25-throughput')})",
            f"dude {_ratio(throughput['dude train, dude'])}, lora {_ratio(throughput['dude train, lora'])}",
        ],
        [
            f"tokens a second of `objective: grpo`, drawing and learning, over TRL's GRPOTrainer with PEFT LoRA, a "
            f"model of 260K parameters, float32, a busy machine ({_link('2026-11-29-grpo-stories260k')})",
            f"dude {_ratio(grpo['dude train, dude'])}, lora {_ratio(grpo['dude train, lora'])}",
        ],
        *_objective_speeds(),
        [
            f"top 16 singular triplets of 4096 x 4096, over a full SVD ({_link('2026-11-30-init')})",
            f"{init['svd']['top 16']['ratio']:.3f} of the time",
        ],
    ]
    for name in ("2026-11-25-plan", "2026-11-25-plan-smollm2"):
        for dtype, found in _record(name)["results"].items():
            what = "the 97.5 M Llama" if name.endswith("plan") else "SmolLM2-135M"
            rows.append(
                [
                    f"`dude plan`: peak of a step, predicted over measured, {what}, {dtype} ({_link(name)})",
                    f"{found['step']['ratio']:.3f}",
                ]
            )
    for dtype in ("float32", "bfloat16"):
        name = f"2026-11-24-merge-{dtype}"
        forward = _record(name)["results"]["forward"]["DuDe, merged"]
        rows.append([f"merged model's forward over the base model's, {dtype} ({_link(name)})", _ratio(forward)])
    for name, what in (("2026-11-25-eval", "a 260 k Llama"), ("2026-11-25-eval-smollm2", "SmolLM2-135M")):
        found = _record(name)["results"]
        asked = f"zero-shot, 8 questions of each of two tasks, {what}, earlier code"
        rows.append([f"`dude eval` over lm-eval, {asked} ({_link(name)})", _ratio(found["one model"]["dude eval"])])
        rows.append(
            [
                f"an adapter and its base, merged in memory over live, {what} ({_link(name)})",
                _ratio(found["an adapter and its base"]["merged in memory"]),
            ]
        )
    for title, found in _record(_HEADS)["results"].items():
        if "head" in title:
            what = title.partition(",")[0]
            against = f"{what} that begin with the same 256 tokens, these computed once, over whole rows"
            rows.append([f"{against} ({_link(_HEADS)})", f"{_ratio(found['head once'])} of the time"])
    grown = list(_record(_MERGES)["results"]["merge"].values())
    measured = ", ".join(f"{row['bytes'] / 1e9:.1f} GB {row['seconds']:.0f} s" for row in grown[:-1])
    rows.append(
        [
            f"`dude merge`: {measured}; what a line through them says of 100 GB ({_link(_MERGES)})",
            f"{grown[-1]['seconds'] / 60:.0f} min, {grown[-1]['peak_mib']:.0f} MiB",
        ]
    )
    merged, killed = merge_file["merge"], merge_file["killed"]
    rows.append(
        [
            f"`dude merge` of {merged['bytes'] / 1e9:.0f} GB ({_link('2026-11-24-merge-file')})",
            f"{merged['peak_mib']:.0f} MiB; killed {killed['kills']} times, {killed['torn']} torn files",
        ]
    )
    return _table(["what", "ratio (quartiles), or figure"], rows)


def limits() -> str:
    rows = []
    for size, what in (("small", "8 layers of 512, 256 tokens"), ("wide", "12 layers of 768, 1,024 tokens")):
        for dtype in ("float32", "bfloat16"):
            name = f"2026-11-30-step-{size}-{dtype}"
            for title, found in _record(name)["results"].items():
                now, before = found["rows"]["DuDe"], found["rows"]["DuDe, other version"]
                rank = title.rpartition(", ")[2]
                bound = f"{now['flops_ratio']:.2f} · {now['bytes_ratio']:.2f}"
                above = 0.04 if size == "small" else 0.01
                goal = "1.08" if rank == "r = 128" else ""
                if size == "small" or dtype == "float32":
                    goal = f"{now['flops_ratio'] + above:.2f}"
                against = f"a step, {what}, {dtype}, {rank}, over PEFT LoRA's ({_link(name)})"
                rows.append([against, bound, goal, _ratio(before), _ratio(now)])
    rows += [*_waits(), *_evaluations()]
    return _table(["what", "bound: operations · bytes", "goal", "code of 25 Nov", "now"], rows)


def launches() -> str:
    record = _record(_LAUNCHES)
    lora = record["results"]["PEFT LoRA"]
    rows = []
    for name, found in record["results"].items():
        parts = [
            f"{found[f'{part}_kernels']:.0f} · {found[f'{part}_mib']:,.0f} MiB · {found[f'{part}_us']:.0f} µs"
            for part in ("forward", "backward", "step")
        ]
        ratio = sum(found[f"{part}_us"] for part in ("forward", "backward", "step"))
        ratio /= sum(lora[f"{part}_us"] for part in ("forward", "backward", "step"))
        rows.append([name, *parts, f"{ratio:.2f}", f"{found['host'] / lora['host']:.1f}"])
    head = f"a layer of a 7B block, 2,048 tokens, r = 16 ([record](../benchmarks/results/{_LAUNCHES}.json))"
    return _table([head, "forward", "backward", "once a step", "GPU time, predicted", "Python's time"], rows)


def _waits() -> list[list[str]]:
    """What a user waits for before the first step."""
    name = "2026-11-30-waiting"
    found = _record(name)["results"]
    alone = found["import"]["python alone"]["median_seconds"]
    more = [f"{1000 * (found['import'][row]['median_seconds'] - alone):.0f} ms" for row in _VERSIONS]
    first = _ratio(found["train"]["to the first step"])
    rows = [
        [f"`import dude_peft`, more than Python alone ({_link(name)})", "", "50 ms", *more],
        [f"`dude train` from Enter to the first step, over the code of 25 Nov ({_link(name)})", "", "0.50", "1", first],
    ]
    for dtype in ("float32", "bfloat16"):
        name = f"2026-11-30-load-{dtype}"
        # Measured on the same day; of bfloat16 there is the older record alone.
        old = f"{name}-code-of-25-nov" if dtype == "float32" else f"2026-11-24-load-{dtype}"
        now = _record(name)["results"]
        bound = f"{1 + now['read and hash']['ratio']:.2f}: PEFT's work, then all read and hashed"
        against = f"loading an adapter, over PEFT's LoRA, {dtype} ({_link(name)})"
        rows.append([against, bound, "1.30", _ratio(_record(old)["results"]["dude"]), _ratio(now["dude"])])
    wholes = {name: _record(name)["results"]["checkpoint"] for name in ("2026-11-24-init", *_STARTS)}
    before, seven, seventy = (f"{found['extrapolated_seconds']:.0f} s" for found in wholes.values())
    peak = wholes[_STARTS[1]]["worker_mib"]
    for what, name, *cells in (
        ("7B's shapes, two cores, from two of 32 layers", _STARTS[0], "80 s", before, seven),
        ("70B's shapes, two cores, from one of 80 layers", _STARTS[1], "", "", f"{seventy}, {peak:.0f} MiB a process"),
    ):
        rows.append([f"`dude init` of a {what} ({_link(name)})", "", *cells])
    return rows


_HEADS, _MERGES = "2026-11-30-generate-head", "2026-11-30-merge-growth"
_LAUNCHES = "2026-11-30-launches"
_STARTS = ("2026-11-30-init", "2026-11-30-init-70b")
_VERSIONS = ("import dude_peft, before", "import dude_peft")


def _evaluations() -> list[list[str]]:
    """Whole commands over lm-eval's own."""
    rows = []
    for task, what, goal in (("mmlu", "MMLU, 5 examples", "0.33"), ("gsm8k", "GSM8K, 8 examples", "0.67")):
        name = f"2026-11-30-eval-commands-{task}"
        times, table = (_record(name)["results"][part] for part in ("times", "table"))
        questions = next(iter(table.values()))["questions"]
        against = f"`dude eval` over lm-eval's command, {what}, {questions} questions ({_link(name)})"
        now = f"{_ratio(times['dude eval'])}; processor time {times['dude eval']['cpu_ratio']:.2f}"
        rows.append([against, "", goal, "", now])
    return rows


def plan_published() -> str:
    name = "2026-11-30-plan-published"
    rows = []
    for found in _record(name)["results"].values():
        why = found["why"]
        if beside := found["beside_gib"]:
            why = f"{why}: {beside:+.2f} GiB, ratio {found['ratio_with_it']:.2f}"
        theirs, ours, ratio = f"{found['theirs_gib']:.2f}", f"{found['ours_gib']:.2f}", f"{found['ratio']:.2f}"
        source = f"[{found['source']}]({found['link']})"
        rows.append([source, found["model"], found["setting"], found["measures"], theirs, ours, ratio, why])
    header = ["model", "setting", "theirs is", "theirs, GiB", "ours, GiB", "ratio", "why they differ"]
    return _table([f"source ({_link(name)})", *header], rows)


def lm_eval_agreement() -> str:
    rows = []
    for task in ("gsm8k", "mmlu"):
        name = f"2026-11-25-eval-samples-{task}"
        for title, found in _record(name)["results"]["table"].items():
            same = [str(found[key]) for key in ("questions", "same_hash", "same_answer", "same_score")]
            rows.append([f"{title} ({_link(name)})", *same])
    return _table(["task", "questions", "same question", "same answer", "same score"], rows)


MAKERS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "gsm8k-sweep": gsm8k_sweep,
    "gsm8k-eval": gsm8k_eval,
    "forgetting": forgetting,
    "mmlu": mmlu,
    "exports": exports,
    "quantised": quantised,
    "objectives": objectives,
    "equal-compute": equal_compute,
    "qlora": qlora,
    "mol": mol,
    "family": family,
    "stories": stories,
    "tinystories": tinystories,
    "boolq": boolq,
    "word-problems": word_problems,
    "method-costs": method_costs,
    "budget": budget,
    "step-model": step_model,
    "step-layer": step_layer,
    "memory": memory,
    "host-memory": host_memory,
    "host-memory-load": host_memory_load,
    "host-memory-ddp": host_memory_ddp,
    "host-memory-nf4": host_memory_nf4,
    "costs": costs,
    "limits": limits,
    "launches": launches,
    "plan-published": plan_published,
    "lm-eval-agreement": lm_eval_agreement,
}
