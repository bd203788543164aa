"""Budgets: what is spent and on which layers, by arithmetic, by weights and by rows; and a run that repeats it."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from models import make
from night import some_by_day
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from served import dude
from tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM

import dude_peft
from dude_peft import DudeConfig
from dude_peft.config.reading import load_config
from dude_peft.config.schema import AdapterSection
from dude_peft.core.reference import reference_tangent_energy
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.methods import METHODS
from dude_peft.methods.sizes import count
from dude_peft.training import calibration
from dude_peft.training import run as run_module
from dude_peft.training.allocation import Lot, greedy_ranks, spent, uniform_rank
from dude_peft.training.budget import shapes_of, spend, targets
from dude_peft.tuner import DudeLinear

RULES = ["uniform", "spectrum", "gradient", "fisher"]
METHODS_WITH_A_PRICE = [name for name, method in METHODS.items() if name != "salt" and method.ranked]
WEIGHTS = "adapter/adapter_model.safetensors"


def section(parameters: object, by: str = "spectrum", **more: object) -> AdapterSection:
    bounds = {key: more.pop(key) for key in ("min_r", "max_r", "calibration_rows") if key in more}
    return AdapterSection(budget={"parameters": parameters, "by": by, **bounds}, **more)


# --- arithmetic ---------------------------------------------------------------------------------------------------


def random_lots(seed: int, method: str = "dude") -> tuple[list[Lot], list[list[float]], list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(torch.randint(3, 40, (2,), generator=generator).tolist()) for _ in range(12)]
    trained = METHODS[method].trained
    lots = [
        Lot(f"layer.{n}", lambda r, shape=shape: count(trained, *shape, r) if r else 0, min(*shape, 9))
        for n, shape in enumerate(shapes)
    ]
    worths = [
        [0.0, *torch.rand(lot.most, generator=generator).sort(descending=True)[0].cumsum(0).tolist()] for lot in lots
    ]
    return lots, worths, shapes


@pytest.mark.parametrize("method", METHODS_WITH_A_PRICE)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("min_r", [0, 1])
def test_never_more_than_the_budget_and_no_rank_could_be_added(method, share, min_r):
    """Also for methods whose price of a rank grows (lora-xs) or has a part that comes once (the magnitude, vera)."""
    for seed in range(5):
        lots, worths, _ = random_lots(seed, method)
        least = spent(lots, [min_r] * len(lots))
        budget = least + int(share * (spent(lots, [9] * len(lots)) - least))
        ranks = greedy_ranks(lots, worths, budget, min_r)
        left = budget - spent(lots, ranks)
        assert left >= 0
        assert all(r >= min(min_r, lot.most) for lot, r in zip(lots, ranks, strict=True))
        for lot, r in zip(lots, ranks, strict=True):
            assert r == lot.most or lot.price(r + 1) - lot.price(r) > left


@pytest.mark.parametrize("budget", [0, 37, 400, 2000, 10**6])
def test_uniform_is_the_largest_rank_of_all(budget):
    lots, _, _ = random_lots(3)
    r = uniform_rank(lots, budget)
    assert spent(lots, [r] * len(lots)) <= budget
    assert r == 9 or r == max(lot.most for lot in lots) or spent(lots, [r + 1] * len(lots)) > budget


def test_the_dearest_buy_waits_for_the_best_one():
    """By hand: prices 10 and 2 a rank; worth 3, 1 against 0.5, 0.4 a rank is 0.3, 0.1 against 0.25, 0.2 a parameter."""
    lots = [Lot("a", lambda r: 10 * r, 2), Lot("b", lambda r: 2 * r, 2)]
    worths = [[0.0, 3.0, 4.0], [0.0, 0.5, 0.9]]
    assert [greedy_ranks(lots, worths, budget) for budget in (1, 2, 9, 10, 12, 14, 23, 24)] == [
        [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [1, 2], [2, 2]
    ]  # fmt: skip


# --- what a rank is worth -----------------------------------------------------------------------------------------


def model_and_layers(architecture: str = "llama", dtype: torch.dtype = torch.float32):
    model = make(architecture, dtype)
    return model, targets(model, section("1%"))


@pytest.mark.parametrize("architecture", ["mistral-gqa", "gpt2-conv1d"])
def test_looking_for_targets_leaves_the_model_as_it_was(architecture):
    model = make(architecture)
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    layers = targets(model, section("1%"))
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not hasattr(model, "peft_config")
    adapted = get_peft_model(model, DudeConfig(r=1, target_modules="all-linear"))
    assert list(layers) == [m.layer_name for m in adapted.modules() if isinstance(m, DudeLinear)]


def test_spectrum_is_the_share_of_energy():
    _, layers = model_and_layers()
    weights = {name: (lambda layer=layer: layer.weight.detach()) for name, layer in layers.items()}
    found = calibration.leading(weights, dict.fromkeys(layers, 5), DudeConfig(svd_tol=0).split_options)
    for name, worth in calibration.spectrum_worths(found).items():
        energy = torch.linalg.svdvals(layers[name].weight.detach().double()).square()
        wanted = (energy.cumsum(0) / energy.sum())[:5].tolist()
        assert worth == pytest.approx([0.0, *wanted], rel=1e-5)


class Rows(list):
    """As a training set knows itself."""

    domain = property(len)


def rows(number: int = 5) -> Rows:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 90, (6 + n,), generator=generator).tolist() for n in range(number)]
    return Rows({"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in drawn)


@pytest.mark.parametrize("architecture", ["mistral-gqa", "gpt2-conv1d", "gemma3-tied"])
@pytest.mark.parametrize("each_row", [False, True])
def test_gradients_are_the_textbooks(architecture, each_row):
    """Against autograd's own gradient of every weight, projected in float64 with whole matrices."""
    model, layers = model_and_layers(architecture, torch.float64)
    conv = architecture == "gpt2-conv1d"
    weights = {
        name: (lambda layer=layer: layer.weight.detach().T if conv else layer.weight.detach())
        for name, layer in layers.items()
    }
    found = list(calibration.leading(weights, dict.fromkeys(layers, 4), DudeConfig(svd_tol=0).split_options))
    worths = calibration.gradient_worths(model, layers, iter(found), rows(), 0, each_row=each_row)
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for row in rows():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        loss = -sum(scores[t, label] for t, label in enumerate(labels[0, 1:].tolist()) if label != -100)
        found_grads = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
        for name, grad in zip(layers, found_grads, strict=True):
            grads[name].append(grad.T if conv else grad)
    for name, svd in found:
        parts = grads[name] if each_row else [sum(grads[name])]
        for r in range(5):
            wanted = sum(float(reference_tangent_energy(G, svd.U, svd.Vh, r)) for G in parts) / len(rows())
            assert worths[name][r] == pytest.approx(wanted, rel=1e-5, abs=1e-12)
    assert all(not layer._forward_hooks for layer in layers.values())
    assert not model.get_input_embeddings()._forward_hooks


def test_a_bad_gradient_is_told():
    model, layers = model_and_layers()
    weights = {name: (lambda layer=layer: layer.weight.detach()) for name, layer in layers.items()}
    found = list(calibration.leading(weights, dict.fromkeys(layers, 2), DudeConfig().split_options))
    model.lm_head.weight.data[5] = torch.inf
    with pytest.raises(NumericsError, match=r"calibration rows is not finite; use model\.dtype"):
        calibration.gradient_worths(model, layers, iter(found), rows(), 0, each_row=False)


def test_calibration_rows_are_training_rows_of_the_domain():
    examples = rows(9)
    chosen = calibration.calibration_rows(examples, 4, seed=1)
    assert len(chosen) == 4
    assert all(row in examples for row in chosen)
    assert chosen == calibration.calibration_rows(examples, 4, seed=1)
    assert chosen != calibration.calibration_rows(examples, 4, seed=2)
    assert len(calibration.calibration_rows(examples, 32, seed=1)) == 9


# --- ranks in an adapter ------------------------------------------------------------------------------------------


def falling(ranks):
    """Worths that differ by layer."""
    return {name: [n * (1 - 0.7**r) for r in range(most + 1)] for n, (name, most) in enumerate(ranks.items(), 1)}


@pytest.mark.parametrize("method", METHODS_WITH_A_PRICE)
def test_the_adapter_trains_what_the_budget_says_under_one_scaling(method):
    model = make("mistral-gqa")
    layers = targets(model, section("1%"))
    paid = sum(count(METHODS[method].trained, *shape, 3) for shape in shapes_of(layers).values())
    asked = section(paid, method=method, r=8, lora_alpha=12, alpha_pattern={"o_proj": 20})
    settled = spend(asked, 10**6, shapes_of(layers), falling)
    adapted = get_peft_model(model, DudeConfig(**settled.adapter.settings()))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == settled.parameters <= paid
    found = {m.layer_name: m for m in adapted.modules() if isinstance(m, DudeLinear)}
    assert {name: found[name].r["default"] if name in found else 0 for name in layers} == settled.ranks
    assert len(set(settled.ranks.values())) > 1
    for name, layer in found.items():
        alpha = 20 if name.endswith("o_proj") else 12
        assert layer.scaling["default"] == pytest.approx(METHODS[method].scaling(8, alpha), rel=1e-12)
    settled.check(adapted)


@pytest.mark.parametrize(
    ("asked", "total"), [("0.5%", 5000), ("2M", 2_000_000), ("1.5k", 1500), (777, 777), ("100%", 10**6)]
)
def test_a_budget_is_a_share_or_a_count(asked, total):
    from dude_peft.training.budget import allowance

    assert allowance(section(asked).budget, 10**6) == total


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"parameters": 10}, "rank 1 in all 14 layers takes"),
        ({"parameters": 10, "by": "spectrum"}, "rank 1 in the smallest layer takes"),
        ({"parameters": 2000, "by": "spectrum", "min_r": 3}, "min_r 3 takes"),
        ({"parameters": "100%"}, "because its layers have no larger ranks"),
        ({"parameters": "100%", "by": "spectrum", "max_r": 2}, "because max_r is 2"),
        ({"parameters": "100%", "by": "spectrum", "max_r": 10**6}, "can be spent, because max_r is"),
    ],
)
def test_what_cannot_be_spent_is_refused(budget, told):
    layers = targets(make("llama"), section("1%"))
    with pytest.raises(ConfigError, match=told) as caught:
        spend(AdapterSection(budget=budget), 10**6, shapes_of(layers), falling)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"budget": {"parameters": "0%"}}, r"parameters': expected a share .* or a count .*, got '0%'"),
        ({"budget": {"parameters": "much"}}, "got 'much'"),
        ({"budget": {"parameters": 0}}, "got 0"),
        ({"budget": {"parameters": "1.5"}}, "got '1.5'"),
        ({"budget": {"by": "spectrum"}}, "parameters' is missing"),
        ({"budget": {"parameters": 9, "of": 1}}, r"key 'adapter\.budget\.of' is unknown"),
        ({"budget": {"parameters": 9, "by": "luck"}}, "'uniform', 'spectrum', 'gradient' or 'fisher'"),
        ({"budget": {"parameters": 9, "max_r": 4}}, "uniform has one rank for all"),
        ({"budget": {"parameters": 9, "by": "spectrum", "min_r": 5, "max_r": 4}}, "max_r' is below"),
        ({"budget": {"parameters": 9}, "rank_pattern": {"q_proj": 2}}, "budget decides the ranks"),
        ({"budget": {"parameters": 9}, "modules_to_save": ["lm_head"]}, "modules_to_save': adapter.budget counts"),
        ({"budget": {"parameters": 9}, "bias": "all"}, "bias': adapter.budget counts"),
    ],
    ids=str,
)
def test_a_wrong_budget_is_one_line(adapter, told):
    values = {"model": {"name_or_path": "m"}, "data": {"train": "a.jsonl", "test": "b.jsonl"}, "output_dir": "o"}
    with pytest.raises(ConfigError, match=told) as caught:
        load_config({**values, "adapter": adapter})
    assert "\n" not in str(caught.value)


def test_a_method_whose_parameters_fall_with_the_rank_is_refused():
    values = {"model": {"name_or_path": "m"}, "data": {"train": "a.jsonl", "test": "b.jsonl"}, "output_dir": "o"}
    run = load_config({**values, "adapter": {"method": "salt", "budget": {"parameters": "1%"}}})
    with pytest.raises(ConfigError, match=r"adapter\.budget': a larger rank of method 'salt'"):
        run.resolved()
    run = load_config({**values, "adapter": {"method": "full", "budget": {"parameters": "1%"}}})
    with pytest.raises(ConfigError, match=r"adapter\.budget': method 'full' has no rank to choose"):
        run.resolved()


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "test.jsonl", 4, start=100)
    return folder


def settings(places: Path, out: Path, by: str, **budget: object) -> dict:
    return {
        "model": {"name_or_path": str(places / "model")},
        "adapter": {"r": 4, "lora_alpha": 6, "budget": {"parameters": "4%", "by": by, **budget}},
        "data": {"train": str(places / "train.jsonl"), "test": str(places / "test.jsonl"), "template": "plain"},
        "train": {"learning_rate": 0.003, "max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 1},
        "evaluation": {"rows": 1, "max_new_tokens": 2},
        "output_dir": str(out),
    }


def stays_uncalibrated(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("calibrated again")

    monkeypatch.setattr("dude_peft.training.budget.leading", refuse)


@pytest.mark.parametrize("by", some_by_day(RULES, ["gradient"]))
def test_a_run_shows_its_ranks_and_repeats_from_its_own_configuration(places, tmp_path, monkeypatch, by):
    first = dude_peft.train(settings(places, tmp_path / "one", by))
    allowed = int(0.04 * tiny_llama().num_parameters())
    assert first.trainable_parameters <= allowed
    assert (tmp_path / "one/ranks.png").read_bytes().startswith(b"\x89PNG")
    assert first.files is not None
    assert "ranks.png" in first.files
    assert first.budget == {"parameters": "4%", "by": by, "calibration_rows": 32, "min_r": 0, "max_r": None}
    written = yaml.safe_load((tmp_path / "one/config.yaml").read_text())
    assert written["adapter"]["budget"] is None
    stays_uncalibrated(monkeypatch)
    written["output_dir"] = str(tmp_path / "two")
    again = dude_peft.train(written)
    assert again.trainable_parameters == first.trainable_parameters
    one, two = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    assert all(torch.equal(one[name], two[name]) for name in {**one, **two})
    card = (tmp_path / "one/adapter/README.md").read_text()
    assert "| adapter.budget.parameters | 4% |" in card
    assert "rank_pattern" not in card


def test_the_adapter_of_a_budget_is_stock_pefts(places, tmp_path):
    dude_peft.train(settings(places, tmp_path / "out", "gradient"))
    base, again = (AutoModelForCausalLM.from_pretrained(places / "model") for _ in range(2))
    ours, stock = dude_peft.load_adapter(base, str(tmp_path / "out/adapter")), None
    stock = PeftModel.from_pretrained(again, str(tmp_path / "out/adapter"))
    ids = tiny_tokenizer()("say 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(ours.eval()(input_ids=ids).logits, stock.eval()(input_ids=ids).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("saved", some_by_day([0, 2], [2]))
def test_an_interrupted_run_goes_on_without_a_second_look(places, tmp_path, monkeypatch, saved):
    """Killed before its first checkpoint, or behind the second: the same YAML, the same bits, no calibration."""
    wanted = settings(places, tmp_path / "cut", "fisher")
    whole = dude_peft.train(settings(places, tmp_path / "whole", "fisher"))

    class CutError(Exception):
        pass

    with monkeypatch.context() as patch:
        if saved:
            from dude_peft.folder.checkpoint import Checkpoints

            save = Checkpoints.save

            def then_cut(self, step, *args):
                save(self, step, *args)
                if step == saved:
                    raise CutError

            patch.setattr(Checkpoints, "save", then_cut)
        else:
            patch.setattr(run_module._Run, "_train", lambda *args: (_ for _ in ()).throw(CutError))
        with contextlib.suppress(CutError):
            dude_peft.train(wanted)
    assert not (tmp_path / "cut/report.json").exists()
    stays_uncalibrated(monkeypatch)
    report = dude_peft.train(wanted)
    assert report.budget == whole.budget
    assert (tmp_path / "cut/ranks.png").is_file()
    one, two = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "cut" / WEIGHTS)
    assert all(torch.equal(one[name], two[name]) for name in {**one, **two})
    other = settings(places, tmp_path / "cut", "fisher", calibration_rows=3)
    with pytest.raises(ConfigError, match=r"adapter\.budget\.calibration_rows: 32 -> 3"):
        dude_peft.train(other)
    monkeypatch.undo()
    del other["adapter"]["budget"]
    dude_peft.train(other, overwrite=True)
    assert not (tmp_path / "cut/ranks.png").exists()


@pytest.mark.parametrize("by", some_by_day(RULES, ["spectrum", "fisher"]))
def test_the_plan_decides_what_it_can(places, tmp_path, by):
    wanted = settings(places, tmp_path / "out", by)
    planned = dude_peft.plan(wanted)
    assert planned.budget is not None
    assert planned.budget.line().startswith(f"budget by {by}: ")
    assert planned.budget.line() in planned._repr_html_()
    told = [text for text in planned.warnings if "adapter.budget" in text]
    report = dude_peft.train(wanted)
    if by in ("uniform", "spectrum"):
        assert not told
        assert planned.config.adapter.model_dump(mode="json") == report.config["adapter"]
        assert planned.as_dict()["parameters"]["trainable"] == report.trainable_parameters
    else:
        assert by in told[0]
        assert "32 training rows" in told[0]


@pytest.mark.slow
def test_the_command_shows_the_ranks_and_the_plan_says_them_too(places, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(places, tmp_path / "out", "gradient")))
    done = dude("plan", path, "--set", "adapter.budget.by=spectrum", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["budget"]) == {"by", "allowed", "ranks"}
    done = dude("train", path)
    assert done.returncode == 0, done.stderr
    assert "budget by gradient: " in done.stdout
    assert re.search(r"model\.layers +q_proj .* down_proj", done.stdout)
    assert re.search(r"^ *1 +[0-9]+ ", done.stdout, re.M)
    done = dude("train", path, "--set", "adapter.budget.parameters=12", "--overwrite")
    assert done.returncode == 2
    assert "raise adapter.budget.parameters" in done.stderr


@pytest.mark.slow
def test_two_processes_train_the_ranks_of_the_first(places, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(places, tmp_path / "two", "gradient")))
    one = dude_peft.train(settings(places, tmp_path / "one", "gradient"))
    done = dude("train", path, "--launch", "ddp", "--processes", "2")
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two/report.json").read_text())
    assert two["config"]["adapter"] == one.config["adapter"]
