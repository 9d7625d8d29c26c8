"""The table holds the mean, the deviation and the best of the runs, and the ensembles, parameters and operations."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.io import imread
from torch.utils.flop_counter import FlopCounterMode

import uctrans
from uctrans.data import find_samples, load_tensors
from uctrans.data.instances import write_instances
from uctrans.inference import Predictor, dice
from uctrans.study import SkipStudyConfig, run, study_models
from uctrans.study.folder import begin, check_study
from uctrans.study.table import Row, Table, count_cost, make_table


def means_of(config, variant, patience, score):
    folders = [planned.at(patience) for planned in config.plan() if planned.variant.name == variant]
    return [json.loads((folder / "test" / "summary.json").read_text())["mean"][score] for folder in folders]


@pytest.mark.parametrize(("study", "over"), [("plain", "seeds"), ("folded", "seeds and folds")])
def test_the_table_holds_mean_deviation_and_best_of_the_runs(study, over, request, table_of):
    config = request.getfixturevalue(study)
    table, text = table_of(config), (Path(config.output) / "table.md").read_text()
    assert [*table] == [(name, patience) for name in config.models for patience in config.patience]
    for (variant, patience), row in table.items():
        for score in ("dice", "iou"):
            values = means_of(config, variant, patience, score)
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            assert float(row[f"{score}_mean"]) == pytest.approx(mean, abs=1e-12)
            assert float(row[f"{score}_deviation"]) == pytest.approx(deviation, abs=1e-12)
            assert float(row[f"{score}_standard_error"]) == pytest.approx(deviation / 2**0.5, abs=1e-12)
            assert float(row[f"{score}_best"]) == max(values)
            assert f"{mean:.4f} ± {deviation:.4f}" in text
        folders = [planned.folder for planned in config.plan() if planned.variant.name == variant]
        models = [uctrans.load_model(folder / f"patience_{patience}") for folder in folders]
        validation = statistics.mean(model.metadata["best_dice"] for model in models)
        assert float(row["validation_dice_mean"]) == pytest.approx(validation)
        assert (row["runs"], row["failed"], row["missing"]) == ("2", "", "0")
    assert f"mean ± sample standard deviation over the {over}." in text
    assert len({row["dice_mean"] for row in table.values()}) > 1, "nothing to tell apart"


def test_the_table_counts_parameters_and_operations(plain, table_of):
    for model, options in (("unet", {}), ("uctransnet", {"num_layers": 1, "image_size": 32, "backend": "reference"})):
        network = uctrans.create_model(model, base_channels=2, **options).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.rand(1, 3, 32, 32))
        row = table_of(plain)[model, 50]
        assert int(row["parameters"]) == sum(parameter.numel() for parameter in network.parameters())
        assert float(row["gflop"]) == pytest.approx(counter.get_total_flops() / 1e9)


def test_the_chart_is_a_picture(plain):
    pixels = imread(Path(plain.output) / "chart.png")
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[::9, ::9].reshape(-1, pixels.shape[-1]), axis=0)) > 10


def test_an_ensemble_is_the_mean_of_the_probabilities_of_a_seed(folded, table_of):
    tensors, differences = None, 0
    for ensemble in folded.ensembles():
        probabilities = []
        for member in ensemble.needs:
            predictor = Predictor(uctrans.load_model(member.at(2)), device="cpu")
            tensors = tensors or load_tensors(find_samples(folded.data, "test"), predictor.protocol, 1)
            probabilities.append(predictor.probabilities(tensors.images))
        differences += (probabilities[0] > 0.5).ne(probabilities[1] > 0.5).sum()
        labels = (torch.stack(probabilities).mean(0)[:, 0] > 0.5).to(torch.uint8).numpy()
        expected = np.mean([dice(*pair, 1).item() for pair in zip(labels, tensors.masks.numpy(), strict=True)])
        row = table_of(folded)[ensemble.needs[0].variant.name, 2]
        assert float(row["ensemble_dice_mean"]) == pytest.approx(expected, abs=1e-6)
        assert row["ensemble_dice_deviation"] == ""
        assert f" {expected:.4f} |" in (Path(folded.output) / "table.md").read_text()
    assert differences > 0, "nothing to tell apart"


def test_the_table_says_where_a_uctransnet_from_a_unet_starts(folded):
    text = (Path(folded.output) / "table.md").read_text()
    assert "uctransnet_from_unet: starts from the U-Net of patience 2 in every row." in text


def test_instance_scores_count_the_images_with_a_map(plain, data, tmp_path, do_here):
    for sample in find_samples(data, "test"):
        for path in (sample.image, sample.mask):
            target = tmp_path / "data" / path.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(data / split)
    mask = uctrans.data.read_mask(data / "test" / "masks" / "test0.png")
    write_instances(tmp_path / "data" / "test" / "instances" / "test0.png", mask.astype(np.int32))
    own = {"data": str(tmp_path / "data"), "output": str(tmp_path / "study"), "models": ("unet",), "model_options": {}}
    text = do_here(replace(plain, **own, seeds=1, epochs=1, score_size="native", score_tta="flips")).table.markdown()
    assert "| AJI |" in " ".join(text.split())
    assert "AJI and PQ: mean over the 1 test images with an instance map." in text
    assert "2 test images, scored at the size of their masks, with test-time transforms flips." in text


def made_up_row(variant, dice, **record):
    runs = {"variant": variant, "model": variant, "patience": 50, "runs": len(dice), "folds": "", "missing": 0}
    by_seed = {f"seed {seed}": value for seed, value in enumerate(dice)}
    values = {name: by_seed for name in ("dice", "iou", "validation_dice") if dice}
    scores = {f"{name}_mean": statistics.mean(dice) for name in values}
    scores |= {f"{name}_deviation": statistics.stdev(dice) if len(dice) > 1 else None for name in values}
    scores |= {f"{name}_standard_error": statistics.stdev(dice) / len(dice) ** 0.5 for name in values if len(dice) > 1}
    scores |= {f"{name}_best": max(dice) for name in values}
    cost = {"parameters": 66_430_657, "gflop": 77.2, "seconds_an_epoch": 1.2345}
    return Row(runs | scores | cost | record, values, failed={})


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.markdown().splitlines() if "|" in line]


def test_failed_missing_and_single_runs(tmp_path):
    rows = [
        made_up_row("whole", [0.7, 0.8, 0.9]),
        replace(made_up_row("single", [0.7], missing=1), failed={"seed 2": "epoch 3"}),
        replace(made_up_row("none", [], seconds_an_epoch=None), failed={"seed 0": "epoch 1"}),
    ]
    table = Table(rows, ["A remark."])
    title, _, whole, single, none = cells_of(table)
    assert title[3:10] == ["Dice", "s.e.", "best Dice", "IoU", "s.e.", "best IoU", "val Dice"]
    assert whole[:6] == ["whole", "50", "3", "0.8000 ± 0.1000", "0.0577", "0.9000"]
    assert whole[-3:] == ["66.431", "77.2", "1.23"]
    assert single[:6] == ["single", "50", "single run of 3", "0.7000", "n/a", "0.7000"]
    assert none[:4] == ["none", "50", "0 of 1", "n/a"]
    text = table.markdown()
    assert len({len(line) for line in text.splitlines()[:5]}) == 1, "columns are not aligned"
    assert "Failed, in none of the scores: single, seed 2: epoch 3; none, seed 0: epoch 1." in text
    assert "Not complete" in text
    assert "A remark." in text
    table.write(tmp_path)
    assert (tmp_path / "table.csv").read_text().splitlines()[3].startswith("none,none,50,0,")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_networks_differ_by_the_mean_over_pairs_of_runs_of_one_seed_and_patience(tmp_path):
    runs = {"plain": [0.70, 0.80, 0.90], "better": [0.72, 0.81, 0.96], "begun": [0.75, 0.80], "single": [0.9]}
    rows = [made_up_row(name, dice) for name, dice in runs.items()]
    table = Table([*rows, made_up_row("plain", [0.71, 0.82, 0.91], patience=100)], [])
    assert [(each.variant, each.other, each.pairs) for each in table.differences] == [
        ("better", "plain", 3),
        ("begun", "plain", 2),
        ("begun", "better", 2),
    ]
    difference = table.differences[0]
    assert difference.mean == pytest.approx(0.03)
    assert difference.standard_error == pytest.approx(statistics.stdev([0.02, 0.01, 0.06]) / 3**0.5)
    *_, titles, _, better, begun = cells_of(table)
    assert titles == ["Dice minus that of, patience 50", "plain", "better"]
    assert better == ["better", "+0.0300 ± 0.0153 (3)", ""]
    assert begun == ["begun", "+0.0250 ± 0.0250 (2)", "+0.0100 ± 0.0200 (2)"]
    table.write(tmp_path)
    lines = (tmp_path / "differences.csv").read_text().splitlines()
    assert lines[0] == "variant,other,patience,pairs,mean,standard_error"
    assert len(lines) == 4


def test_the_differences_of_a_study_pair_the_folds(folded):
    differences = study_models(folded).table.differences
    assert [each.patience for each in differences] == [1, 2]
    for difference in differences:
        scores = [
            {
                planned.label: json.loads((planned.at(difference.patience) / "test" / "summary.json").read_text())
                for planned in folded.plan()
                if planned.variant.name == name
            }
            for name in (difference.variant, difference.other)
        ]
        paired = [scores[0][label]["mean"]["dice"] - scores[1][label]["mean"]["dice"] for label in scores[0]]
        assert difference.pairs == 2
        assert difference.mean == pytest.approx(statistics.mean(paired))


def test_single_runs_have_no_deviation():
    text = Table([made_up_row("unet", [0.7]), made_up_row("other", [0.8])], []).markdown()
    assert "±" not in text
    assert "a single run each" in text


def test_a_study_of_skips_has_a_row_for_each_subset(settings, tmp_path):
    own = {name: value for name, value in settings.items() if name not in ("models", "model_options")}
    config = SkipStudyConfig(**own | {"epochs": 1, "seeds": 1}, output=str(tmp_path / "skips"))
    plan = config.plan()
    begin(config, check_study(config, "skips", plan))
    run.train_and_score(plan[0], config)
    table = make_table(config, plan, {planned.variant.name: count_cost(planned.config) for planned in plan})
    assert [row.record["variant"] for row in table.rows][:3] == ["none", "all", "only_1"]
    assert [row.record["runs"] for row in table.rows] == [1, *[0] * 9]
    assert uctrans.load_model(tmp_path / "skips" / "runs" / "none" / "seed_0").config["skips"] == []
    assert len(table.remarks) == 1

    path = plan[0].at(plan[0].patiences[0]) / "test" / "summary.json"
    summary = json.loads(path.read_text()) | {"known_images": {"train": {"test1": "train0"}, "val": {"test0": "test0"}}}
    path.write_text(json.dumps(summary))
    table = make_table(config, plan, {planned.variant.name: count_cost(planned.config) for planned in plan})
    assert table.remarks[1] == ("Not a test: networks were trained on, or chosen by, 2 of these images: test0, test1.")
