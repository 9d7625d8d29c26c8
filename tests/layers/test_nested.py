"""Blocks of the dual-branch network against the same steps in single taps, sums and maxima."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uctrans.layers import DualBranchDown, DualBranchEncoder, NestedU, U2DownBlock, U2UpBlock
from uctrans.layers.nested import DilatedConvNormAct

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def randomised(module, training):
    """Return the module in float64, with statistics and affine parameters that are not 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
    return module.double().train(training)


def normal(*shape, seed=1):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


def convolved(feature, conv, dilation=1):
    """Convolve by summing over the nine taps; outside of the map there are zeros."""
    height, width = feature.shape[-2:]
    padded = F.pad(feature, [dilation] * 4)
    result = conv.bias.view(1, -1, 1, 1)
    for row in range(3):
        for column in range(3):
            top, left = row * dilation, column * dilation
            tap = padded[..., top : top + height, left : left + width]
            result = result + torch.einsum("bihw,oi->bohw", tap, conv.weight[..., row, column])
    return result


def normalised(feature, norm):
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = feature.mean((0, 2, 3)), feature.var((0, 2, 3), unbiased=False)
    mean, variance, weight, bias = (each.view(1, -1, 1, 1) for each in (mean, variance, norm.weight, norm.bias))
    return (feature - mean) / (variance + norm.eps).sqrt() * weight + bias


def convolved_twice(feature, blocks, dilation=1):
    for block in blocks:
        feature = normalised(convolved(feature, block.conv, dilation), block.norm).clamp(min=0)
    return feature


def pooled(feature):
    quarters = [feature[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.stack(quarters).amax(0)


def upsampled(feature, transposed):
    """Turn each pixel into 2x2 pixels, each by its own matrix."""
    grown = feature.new_zeros(feature.shape[0], transposed.out_channels, *(2 * side for side in feature.shape[-2:]))
    for row in (0, 1):
        for column in (0, 1):
            corner = torch.einsum("bihw,io->bohw", feature, transposed.weight[..., row, column])
            grown[..., row::2, column::2] = corner + transposed.bias.view(1, -1, 1, 1)
    return grown


def down_block(block, feature):
    feature = convolved_twice(feature, block.convs)
    return feature, pooled(feature)


def up_block(block, skip, feature):
    return convolved_twice(torch.cat([skip, upsampled(feature, block.upsample)], 1), block.convs)


def nested_u(block, feature):
    inner, skips = feature, []
    for down in block.down:
        skip, inner = down_block(down, inner)
        skips.append(skip)
    for up, skip in zip(list(block.up)[::-1], skips[::-1], strict=True):
        inner = up_block(up, skip, inner)
    return feature + inner


def assert_same(module, written_out, *inputs):
    """Compare outputs, and gradients by inputs and parameters."""
    leaves = [*inputs, *module.parameters()]
    results = []
    for function in (module, written_out):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [normal(*output.shape, seed=index + 5).detach() for index, output in enumerate(outputs)]
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


class TestDualBranchDown:
    @MODES
    @pytest.mark.parametrize("dilation", [1, 2, 3])
    def test_written_out(self, dilation, training):
        module = randomised(DualBranchDown(3, 4, dilation), training)

        def written_out(feature):
            feature = pooled(feature)
            branches = [convolved_twice(feature, module.regular), convolved_twice(feature, module.dilated, dilation)]
            return torch.cat(branches, 1)

        assert_same(module, written_out, normal(2, 3, 12, 10))

    def test_dilation_wider_than_the_map(self):
        """Images may be smaller than ``image_size``; then only the middle tap meets the map."""
        module = randomised(DualBranchDown(3, 4, 2), training=False)
        feature = normal(2, 3, 4, 4)
        middle = DilatedConvNormAct(3, 2, 2).double().eval()
        middle.load_state_dict(module.dilated[0].state_dict())
        middle.conv = nn.Conv2d(3, 2, 1).double()
        middle.conv.weight.data = module.dilated[0].conv.weight.data[..., 1:2, 1:2]
        middle.conv.bias.data = module.dilated[0].conv.bias.data
        torch.testing.assert_close(module.dilated[0](pooled(feature)), middle(pooled(feature)))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((3, 5), ValueError, "out_channels must be even, as each branch gives half of them; got 5"),
            ((0, 4), ValueError, "in_channels must be at least 1; got 0"),
            ((3, 4, 0), ValueError, "dilation must be at least 1; got 0"),
            ((3, 4, 1.5), TypeError, "dilation must be an int, such as 4; got 1.5"),
        ],
        ids=str,
    )
    def test_refuses(self, arguments, error, message):
        with pytest.raises(error, match=message):
            DualBranchDown(*arguments)


class TestU2Blocks:
    @MODES
    def test_down_written_out(self, training):
        module = randomised(U2DownBlock(3, 4), training)
        assert_same(module, lambda feature: down_block(module, feature), normal(2, 3, 6, 4))

    @MODES
    def test_up_written_out(self, training):
        module = randomised(U2UpBlock(3, 5, 2), training)
        assert_same(
            module,
            lambda skip, feature: up_block(module, skip, feature),
            normal(2, 3, 6, 4),
            normal(2, 5, 3, 2, seed=2),
        )


class TestNestedU:
    @MODES
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_written_out(self, depth, training):
        module = randomised(NestedU(3, 2, depth), training)
        assert_same(module, lambda feature: nested_u(module, feature), normal(2, 3, 16, 8))

    def test_residual(self):
        """A U whose result is zero leaves the feature unchanged."""
        module = randomised(NestedU(3, 2, 2), training=False)
        last = module.up[0].convs[1].norm
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        feature = normal(2, 3, 8, 12)
        assert torch.equal(module(feature), feature)

    @pytest.mark.parametrize("depth", [1, 2, 3, 4])
    def test_depth_is_how_often_the_map_is_halved(self, depth):
        module, sides = NestedU(3, 2, depth), []
        for block in module.down:
            block.register_forward_hook(lambda block, inputs, output: sides.append(tuple(output[1].shape[-2:])))
        module.eval()(torch.rand(1, 3, 16, 32))
        assert sides == [(16 >> level, 32 >> level) for level in range(1, depth + 1)]

    @pytest.mark.parametrize("size", [(8, 4), (16, 12), (0, 8)], ids=str)
    def test_refuses_a_map_that_cannot_hold_its_depth(self, size):
        module = NestedU(3, 2, 3)
        with pytest.raises(ValueError, match=f"depth 3 needs a map of multiples of 8 pixels; got {size[0]}x{size[1]}"):
            module(torch.rand(1, 3, *size))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [((3, 2, 0), "depth must be at least 1"), ((3, 0, 1), "inner_channels must be at least 1")],
        ids=str,
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            NestedU(*arguments)


class TestDualBranchEncoder:
    def encoder(self, **options):
        arguments = {"dilations": (3, 2), "depths": (2, 1), "nested_channels": (3, 5)} | options
        return randomised(DualBranchEncoder(2, (4, 6), **arguments), training=False)

    def test_written_out(self):
        module = self.encoder()

        def written_out(image):
            finest = nested_u(module.nested[0], convolved_twice(image, [module.stem]))
            maps, feature = [finest], finest
            for stage, dilation in zip(module.stages, (3, 2), strict=True):
                branches = [(stage.regular, 1), (stage.dilated, dilation)]
                below = pooled(feature)
                feature = torch.cat([convolved_twice(below, branch, spacing) for branch, spacing in branches], 1)
                if len(maps) == 1:
                    feature = nested_u(module.nested[1], feature)
                    maps.append(feature)
            return (*maps, feature)

        def flat(image):
            features, deepest = module(image)
            return (*features, deepest)

        flat.parameters = module.parameters
        assert_same(flat, written_out, normal(2, 2, 8, 12))

    def test_shapes(self):
        features, deepest = self.encoder()(normal(1, 2, 16, 24))
        assert [tuple(feature.shape) for feature in features] == [(1, 4, 16, 24), (1, 6, 8, 12)]
        assert deepest.shape == (1, 6, 4, 6)

    def test_depth_zero_is_a_level_without_a_nested_u(self):
        module = self.encoder(depths=(0, 1))
        image = normal(1, 2, 16, 24)
        assert torch.equal(module(image)[0][0], module.stem(image))
        assert not [name for name, _ in module.named_parameters() if name.startswith("nested.0")]
