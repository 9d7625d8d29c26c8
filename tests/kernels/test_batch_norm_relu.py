"""Batch norm and ReLU in plain PyTorch: against ``nn.BatchNorm2d``, and bad input of the public function.

``test_batch_norm_relu_triton.py`` tests the Triton operator.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn

from tests.kernels.support import (
    BACKENDS,
    DEVICE,
    FORMATS,
    assert_within_budget_of,
    norm_inputs,
    norm_results,
    published_norm_results,
    running_statistics,
)
from uctrans.kernels import batch_norm_relu


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_composed_stays_within_the_error_budget(memory_format, dtype, training):
    draws = [norm_inputs((2, 3, 4, 5), dtype, memory_format, seed) for seed in range(3)]
    form = partial(norm_results, backend="composed")
    assert_within_budget_of(published_norm_results, form, draws, training=training)


def test_written_out_by_hand():
    """One channel of two pixels: the formula in plain numbers."""
    pytest.importorskip("triton")
    feature = torch.tensor([[[[1.0, 5.0]]]], device=DEVICE)  # mean 3, deviation 2
    for backend in BACKENDS:
        weight, bias, mean, variance = (torch.tensor([value], device=DEVICE) for value in (2.0, 1.0, 10.0, 20.0))
        output = batch_norm_relu(
            feature, weight, bias, mean, variance, training=True, momentum=0.5, eps=1e-12, backend=backend
        )
        torch.testing.assert_close(output, torch.tensor([[[[0.0, 3.0]]]], device=DEVICE))
        torch.testing.assert_close((mean.item(), variance.item()), (6.5, 14.0))  # the unbiased variance is 8
        mean.fill_(3.0), variance.fill_(4.0)
        output = batch_norm_relu(feature, weight, bias, mean, variance, training=False, eps=12.0, backend=backend)
        torch.testing.assert_close(output, torch.tensor([[[[0.0, 2.0]]]], device=DEVICE))


class TestWhatPlainPyTorchAllows:
    """``composed`` is no black box to PyTorch: what works on batch norm and ReLU works on it."""

    @staticmethod
    def loss(backend, training=False):
        inputs = norm_inputs()
        running = running_statistics(inputs)

        def of_feature(feature):
            return batch_norm_relu(feature, *inputs[1:], *running, training=training, backend=backend).square().sum()

        return of_feature

    def test_functional_transforms(self):
        feature = norm_inputs()[0]
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            ours, published = (transform(self.loss(name))(feature) for name in ("composed", "reference"))
            torch.testing.assert_close(ours, published)

    def test_vmap(self):
        feature = norm_inputs()[0]
        many = torch.stack([feature, 2 * feature])
        ours, published = (torch.vmap(self.loss(name))(many) for name in ("composed", "reference"))
        torch.testing.assert_close(ours, published)

    @pytest.mark.parametrize("training", [True, False])
    def test_forward_mode(self, training):
        feature = norm_inputs()[0]
        tangents = []
        for name in ("composed", "reference"):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(feature, torch.ones_like(feature).cumsum(3))
                tangent = torch.autograd.forward_ad.unpack_dual(self.loss(name, training)(dual)).tangent
                tangents.append(tangent)
        torch.testing.assert_close(*tangents)

    def test_output_may_be_overwritten_afterwards(self):
        inputs = [tensor.requires_grad_() for tensor in norm_inputs()]
        running = running_statistics(inputs)
        gradients = []
        for name in ("composed", "reference"):
            output = batch_norm_relu(*inputs, *running, training=True, backend=name)
            gradients.append(torch.autograd.grad(output.mul(2).add_(1).sum(), inputs))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
class TestLikeBatchNorm2d:
    """Behaviour of ``nn.BatchNorm2d`` that users rely on, on every backend."""

    @pytest.fixture(autouse=True)
    def triton(self):
        pytest.importorskip("triton")

    @pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.37])
    def test_running_statistics_over_ten_steps(self, backend, momentum):
        norm = nn.BatchNorm2d(3, momentum=momentum).to(DEVICE)
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        addresses = mean.data_ptr(), variance.data_ptr()
        for step in range(10):
            feature = norm_inputs((2, 3, 4, 5), torch.float32, seed=step)[0] * (step + 1) + step
            norm(feature)
            batch_norm_relu(
                feature, norm.weight, norm.bias, mean, variance, training=True, momentum=momentum, backend=backend
            )
            torch.testing.assert_close(mean, norm.running_mean, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(variance, norm.running_var, rtol=2e-6, atol=2e-6)
        assert (mean.data_ptr(), variance.data_ptr()) == addresses

    def test_bias_of_a_convolution_and_count_of_batches(self, backend):
        norm, (feature, *_) = nn.BatchNorm2d(3).to(DEVICE), norm_inputs(dtype=torch.float32)
        conv_bias = torch.tensor([5.0, 0.0, -1.0], device=DEVICE)
        running = norm.running_mean.clone(), norm.running_var.clone()
        count = norm.num_batches_tracked.clone()
        for training in (True, False):
            expected = norm.train(training)(feature + conv_bias[:, None, None]).relu()
            options = {"training": training, "conv_bias": conv_bias, "num_batches_tracked": count, "backend": backend}
            output = batch_norm_relu(feature, norm.weight, norm.bias, *running, **options)
            torch.testing.assert_close((output, *running, count), (expected, *norm.buffers()))

    def test_copies_of_each_pixel(self, backend):
        """The running statistics of a map upsampled by nearest neighbours."""
        norm, (feature, *_) = nn.BatchNorm2d(3).to(DEVICE), norm_inputs(dtype=torch.float32)
        running = norm.running_mean.clone(), norm.running_var.clone()
        expected = norm(nn.Upsample(scale_factor=2)(feature)).relu()[..., ::2, ::2]
        output = batch_norm_relu(feature, norm.weight, norm.bias, *running, training=True, copies=4, backend=backend)
        torch.testing.assert_close((output, *running), (expected, norm.running_mean, norm.running_var))

    def test_running_statistics_stay_as_they_are_without_training(self, backend):
        inputs = norm_inputs(dtype=torch.float32)
        running = running_statistics(inputs)
        *_, mean, variance = norm_results(inputs, training=False, backend=backend)
        assert torch.equal(mean, running[0]) and torch.equal(variance, running[1])

    def test_no_running_statistics(self, backend):
        inputs = norm_inputs(dtype=torch.float32)
        output = batch_norm_relu(*inputs, None, None, training=True, backend=backend)
        torch.testing.assert_close(output, norm_results(inputs, backend=backend)[0])

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    @pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
    def test_no_values(self, backend, shape, memory_format):
        """The output is empty, running statistics stay, and gradients by parameters are zero."""
        inputs = norm_inputs(shape, torch.float32, memory_format)
        for training in (True, False):
            output, d_feature, d_weight, d_bias, mean, variance = norm_results(
                inputs, training=training, backend=backend
            )
            assert output.shape == d_feature.shape == shape
            assert not d_weight.any() and not d_bias.any()
            if shape[0] == 0:  # of an empty map of some images torch makes no numbers of the running statistics
                torch.testing.assert_close((mean, variance), running_statistics(inputs))

    def test_one_value_a_channel(self, backend):
        inputs = norm_inputs((1, 3, 1, 1), torch.float32)
        with pytest.raises(ValueError, match=r"more than 1 value per channel when training, .* \(1, 3, 1, 1\): give"):
            norm_results(inputs, backend=backend)
        assert norm_results(inputs, training=False, backend=backend)[0].isfinite().all()

    @pytest.mark.parametrize("feature_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtype_under_autocast(self, backend, feature_dtype):
        inputs = norm_inputs(dtype=feature_dtype)
        norm = nn.BatchNorm2d(3).to(DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = norm_results(inputs, backend=backend)
            assert found[0].dtype == norm(inputs[0]).dtype == feature_dtype
        assert [tensor.dtype for tensor in found[1:]] == [feature_dtype] + 4 * [torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
class TestBadInput:
    """Refused before anything runs, and so by every backend and on any device alike."""

    @staticmethod
    def call(backend, change=lambda tensors: None, **options):
        inputs = norm_inputs(dtype=torch.float32)
        tensors = dict(zip(("feature", "weight", "bias"), inputs, strict=True))
        tensors |= dict(zip(("running_mean", "running_var"), running_statistics(inputs), strict=True))
        change(tensors)
        return batch_norm_relu(**tensors, **{"training": True, "backend": backend} | options)

    @pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
    def test_shapes(self, backend, name):
        with pytest.raises(ValueError, match=rf"{name} must be \(3,\); got \(2,\)"):
            self.call(backend, lambda tensors: tensors.update({name: tensors[name][1:]}))
        with pytest.raises(ValueError, match=rf"{name} must be \(3,\); got \(1, 3\)"):
            self.call(backend, lambda tensors: tensors.update({name: tensors[name][None]}))

    def test_bias_of_a_convolution(self, backend):
        def give(conv_bias):
            return lambda tensors: tensors.update(conv_bias=conv_bias.to(DEVICE))

        with pytest.raises(ValueError, match=r"conv_bias must be \(3,\); got \(2,\)"):
            self.call(backend, give(torch.zeros(2)))
        with pytest.raises(TypeError, match=r"one dtype.*conv_bias torch\.float16"):
            self.call(backend, give(torch.zeros(3).half()))

    @pytest.mark.parametrize("count", [torch.zeros(1, dtype=torch.int64), torch.tensor(0.0)], ids=str)
    def test_count_of_batches(self, backend, count):
        with pytest.raises(ValueError, match=r"num_batches_tracked must be \(\) of whole numbers on"):
            self.call(backend, lambda tensors: tensors.update(num_batches_tracked=count.to(DEVICE)))

    def test_no_map(self, backend):
        with pytest.raises(ValueError, match=r"feature must be \(B, C, H, W\); got \(3, 4, 5\)"):
            self.call(backend, lambda tensors: tensors.update(feature=tensors["feature"][0]))

    def test_part_of_the_running_statistics(self, backend):
        for name in ("running_mean", "running_var"):
            with pytest.raises(ValueError, match="belong together: give both or neither"):
                self.call(backend, lambda tensors, name=name: tensors.update({name: None}))
        with pytest.raises(ValueError, match="without training there must be running_mean and running_var"):
            self.call(backend, lambda tensors: tensors.update(running_mean=None, running_var=None), training=False)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("weight", torch.float64), ("running_var", torch.float16), ("feature", torch.float64), ("bias", torch.half)],
        ids=str,
    )
    def test_dtypes(self, backend, name, dtype):
        with pytest.raises(TypeError, match=r"share one dtype.*: convert them with \.to\(dtype\)"):
            self.call(backend, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))

    def test_parameters_in_half_precision_beside_a_float32_feature(self, backend):
        def change(tensors):
            tensors.update({name: tensor.half() for name, tensor in tensors.items() if name != "feature"})

        for is_on in (False, True):
            with (
                torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=is_on),
                pytest.raises(TypeError, match="share one dtype, float32 or the feature's; got feature torch"),
            ):
                self.call(backend, change)

    def test_no_floating_point_and_no_tensor(self, backend):
        with pytest.raises(TypeError, match=r"feature must be floating point, .*; got torch\.int64"):
            self.call(backend, lambda tensors: tensors.update(feature=tensors["feature"].long()))
        with pytest.raises(TypeError, match="bias must be a tensor; got NoneType"):
            self.call(backend, lambda tensors: tensors.update(bias=None))

    def test_devices(self, backend):
        with pytest.raises(ValueError, match=r"on one device; got .*running_var meta"):
            self.call(backend, lambda tensors: tensors.update(running_var=tensors["running_var"].to("meta")))

        def all_but_the_feature(tensors):
            tensors.update({name: tensor.to("meta") for name, tensor in tensors.items() if name != "feature"})

        with pytest.raises(ValueError, match=r"on one device; got feature .*weight meta"):
            self.call(backend, all_but_the_feature)

    @pytest.mark.parametrize("eps", [-1e-5, 0.0, math.nan, math.inf])
    def test_eps(self, backend, eps):
        with pytest.raises(ValueError, match=f"eps must be finite and above 0; got {eps}"):
            self.call(backend, eps=eps)
        if eps != 0:
            with pytest.raises(ValueError, match=f"eps must be finite and at least 0; got {eps}"):
                self.call(backend, eps=eps, training=False)

    @pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan])
    def test_momentum(self, backend, momentum):
        with pytest.raises(ValueError, match=rf"momentum must be in \[0, 1\]; got {momentum}"):
            self.call(backend, momentum=momentum)

    def test_copies(self, backend):
        with pytest.raises(ValueError, match="copies must be at least 1; got 0"):
            self.call(backend, copies=0)

    def test_no_number(self, backend):
        with pytest.raises(TypeError, match="momentum must be a number; got NoneType"):
            self.call(backend, momentum=None)
        with pytest.raises(TypeError, match="eps must be a number; got str"):
            self.call(backend, eps="1e-5")

    def test_unknown_name(self, backend):
        with pytest.raises(ValueError, match=f"unknown backend '{backend}s'; choose one of auto, triton"):
            self.call(f"{backend}s")
