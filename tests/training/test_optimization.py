"""The published schedule, the fused optimizers, and the moving average of the weights."""

import copy
import math

import pytest
import torch

from uctrans.training.optimization import WeightAverage, build_optimizer, learning_rate


def test_moving_average_is_its_closed_form():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.9)
    history = [copy.deepcopy(model.state_dict())]
    for _ in range(10):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        model(torch.randn(4, 3))
        average.update(model)
        history.append(copy.deepcopy(model.state_dict()))
    for name in ("0.weight", "1.running_var"):
        expected = 0.9**10 * history[0][name]
        for step in range(1, 11):
            expected = expected + 0.1 * 0.9 ** (10 - step) * history[step][name]
        torch.testing.assert_close(average.model.state_dict()[name], expected)
    assert average.model[1].num_batches_tracked == 10
    assert not average.model.training


def test_learning_rates_are_the_published_schedule(make_config):
    config = make_config(learning_rate=1e-3, min_learning_rate=1e-4, restart_period=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=1, eta_min=1e-4)
    for epoch in range(1, 35):
        assert learning_rate(config, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_one_cosine_over_all_epochs_after_a_warm_up(make_config):
    config = make_config(
        learning_rate=1.0, min_learning_rate=0.0, restart_period=None, warmup_epochs=4, epochs=20, first_best_epoch=1
    )
    rates = [learning_rate(config, epoch) for epoch in range(1, 21)]
    cosine = [(1 + math.cos(math.pi * epoch / 20)) / 2 for epoch in range(20)]
    assert rates[:4] == pytest.approx([share * rate for share, rate in zip((0.2, 0.4, 0.6, 0.8), cosine, strict=False)])
    assert rates[4:] == pytest.approx(cosine[4:])


def test_the_step_uses_the_learning_rate_of_its_epoch(make_run):
    run = make_run(learning_rate=1e-3, min_learning_rate=1e-4)
    run.epoch = 5
    run.begin_epoch()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(5.5e-4)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizer_is_the_fused_one_that_was_asked_for(make_config, name, kind):
    optimizer = build_optimizer(make_config(optimizer=name), torch.nn.Linear(2, 2), torch.device("cpu"))
    assert type(optimizer) is kind
    assert optimizer.defaults["fused"]


def test_fused_adam_is_adam(make_config):
    model = torch.nn.Linear(3, 1)
    plain = copy.deepcopy(model)
    fused = build_optimizer(make_config(learning_rate=1e-2), model, torch.device("cpu"))
    reference = torch.optim.Adam(plain.parameters(), lr=1e-2, fused=False, foreach=False)
    for _ in range(5):
        inputs = torch.randn(4, 3)
        for network, optimizer in ((model, fused), (plain, reference)):
            optimizer.zero_grad()
            network(inputs).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, plain.weight)
