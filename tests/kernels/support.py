"""Helpers of the operators' tests: devices and dtypes, drawn arguments, and comparison with float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from uctrans.kernels import (
    batch_norm_relu,
    batch_norm_relu_pool,
    channel_attention,
    cross_layer_norm,
    packed_layer_norm,
    packed_linear,
    packed_mlp,
    projected_channel_attention,
    segmentation_scores,
    segmentation_sums,
    skip_gate,
)
from uctrans.kernels.segmentation_loss.reference import segmentation_sums as published_sums
from uctrans.kernels.skip_gate.reference import skip_gate as published_skip_gate
from uctrans.kernels.testing import assert_within_budget, outputs_and_gradients

try:
    import hypothesis
    from hypothesis import strategies
except ImportError:
    hypothesis = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def drawn(examples: int, arguments: Callable[..., dict]) -> Callable:
    """Run a test on so many examples; ``arguments`` takes hypothesis's ``strategies`` and returns one a parameter."""

    def decorate(test: Callable) -> Callable:
        if hypothesis is None:  # as on some machines with a GPU
            return pytest.mark.skip(reason="hypothesis is not installed: pip install hypothesis")(test)
        settings = hypothesis.settings(max_examples=examples, deadline=None)
        return settings(hypothesis.given(**arguments(strategies))(test))

    return decorate


def random_like(tensor, seed=7):
    """Return standard normal numbers in float64 that are those of ``tensor``'s dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(DEVICE, tensor.dtype).double()


def results(function, inputs):
    """Return the output of a function of tensors, and the gradients for a fixed random gradient of the output."""
    inputs = [tensor.detach() for tensor in inputs]
    return outputs_and_gradients(function, inputs, random_like(function(*inputs)))


def assert_as_exact_as(oracle, function, inputs, gradient=None):
    """Compare output and every gradient with ``oracle`` in float64, within the budget of ``oracle`` in their dtype."""
    inputs = [tensor.detach() for tensor in inputs]
    exact = [tensor.double() for tensor in inputs]
    if gradient is None:
        gradient = random_like(oracle(*exact).to(inputs[0].dtype))
    assert_within_budget(
        outputs_and_gradients(function, inputs, gradient),
        outputs_and_gradients(oracle, inputs, gradient),
        outputs_and_gradients(oracle, exact, gradient),
    )


FORMATS = [torch.contiguous_format, torch.channels_last]
CPU_PAIRS = [(torch.contiguous_format, torch.float32), (torch.channels_last, torch.bfloat16)]
OTHER_PAIRS = [(torch.contiguous_format, torch.float16), (torch.channels_last, torch.float32)]
GPU_PAIRS = [*OTHER_PAIRS, (torch.contiguous_format, torch.bfloat16), (torch.channels_last, torch.float16)]
# Every dtype and both formats on a GPU; in the interpreter, where time is short, each format in one dtype.
PAIRS = [*CPU_PAIRS, *(pytest.param(*pair, marks=pytest.mark.gpu) for pair in GPU_PAIRS)]
BACKENDS = ["reference", "composed", "triton"]


def alternately(names, others):
    """Return parameters for all pairs of a name and another value; every second one runs with the slow tests."""
    return [
        pytest.param(name, other, marks=pytest.mark.slow if (place + number) % 2 else [])
        for place, name in enumerate(names)
        for number, other in enumerate(others)
    ]


def over_dtypes(shapes):
    """Parametrise ``shape`` and ``dtype``: a quick run takes float16 with the first shape only."""
    parameters = [
        pytest.param(shape, dtype, marks=pytest.mark.slow if place and dtype == torch.float16 else [])
        for place, shape in enumerate(shapes)
        for dtype in TRITON_DTYPES
    ]
    return pytest.mark.parametrize(("shape", "dtype"), parameters, ids=str)


def over_pairs(names):
    """Parametrise ``name`` and :data:`PAIRS`: a quick run takes the CPU's pairs in turn, a slow one both."""
    parameters = []
    for place, name in enumerate(names):
        for number, pair in enumerate(CPU_PAIRS):
            parameters.append(pytest.param(name, *pair, marks=pytest.mark.slow if (place + number) % 2 else []))
        parameters += [pytest.param(name, *pair, marks=pytest.mark.gpu) for pair in GPU_PAIRS]
    return pytest.mark.parametrize(("name", "memory_format", "dtype"), parameters, ids=str)


def normal(*size, dtype=torch.float32, seed=7):
    """Return standard normal numbers on :data:`DEVICE`."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def assert_same_bits(results, expected):
    """Compare two lists of tensors to the last bit."""
    for place, (result, same) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, same), f"result {place}"


def assert_within_budget_of(oracle, function, draws, **options):
    """Compare lists of results with those of ``oracle`` in float64, over several draws of inputs together.

    Where results are few numbers, a single draw is luck. ``function`` and ``oracle`` take the inputs of a draw, a list
    of tensors and ``None``, and ``rounded``, the dtype that the gradients they draw are rounded to; they return a list.
    """
    runs = {"function": [], "baseline": [], "exact": []}
    for inputs in draws:
        exact = [None if tensor is None else tensor.double() for tensor in inputs]
        options["rounded"] = inputs[0].dtype
        runs["function"].append(function(inputs, **options))
        runs["baseline"].append(oracle(inputs, **options))
        runs["exact"].append(oracle(exact, **options))
    assert_within_budget(*([torch.stack(draws) for draws in zip(*run, strict=True)] for run in runs.values()))


def change_constants(monkeypatch, modules, constants):
    """Give constants of launchers other values of the same type, so that small maps take many programs and parts."""
    for name, value in constants.items():
        (module,) = (module for module in modules if hasattr(module, name))
        assert type(getattr(module, name)) is type(value)
        monkeypatch.setattr(module, name, value)


def watch_launches(monkeypatch, *modules):
    """Return a dictionary that fills with the last launch of each kernel: its programs and its arguments."""
    found = {}

    class Watched:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, programs):
            def launch(**arguments):
                found[self.name] = (programs, arguments)
                self.kernel[programs](**arguments)

            return launch

    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Watched(name, kernel))
    return found


def gate_inputs(
    batch=2,
    channels=5,
    decoder_channels=3,
    grid=(2, 3),
    patch=(4, 4),
    factor=(2, 2),
    dtype=torch.float64,
    seed=0,
    has_tokens=True,
    memory_format=torch.contiguous_format,
):
    """Return the seven inputs of ``skip_gate`` for a map of ``grid`` times ``patch`` pixels, ``None`` if not there.

    The decoder feature is ``factor`` times smaller than the map; ``decoder_channels=None`` leaves it and its weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    height, width = grid[0] * patch[0], grid[1] * patch[1]
    has_decoder = decoder_channels is not None
    maps = [
        random(batch, channels, height, width),
        random(batch, channels, *grid) if has_tokens else None,
        random(batch, decoder_channels, height // factor[0], width // factor[1]) if has_decoder else None,
    ]
    return [
        *(None if tensor is None else tensor.contiguous(memory_format=memory_format) for tensor in maps),
        random(channels, channels),
        random(channels),
        random(channels, decoder_channels) if has_decoder else None,
        random(channels) if has_decoder else None,
    ]


def of_those_there(function, inputs):
    """Return ``function`` as one of the inputs that are not ``None``, and those inputs."""
    places = [place for place, tensor in enumerate(inputs) if tensor is not None]

    def call(*tensors):
        given = dict(zip(places, tensors, strict=True))
        return function(*(given.get(place) for place in range(len(inputs))))

    return call, [inputs[place] for place in places]


def gate_results(inputs, gradient=None, function=published_skip_gate, rounded=None, **options):
    """Return the output of a form of ``skip_gate``, and the gradients by those inputs that are there."""
    if gradient is None:
        size = published_skip_gate(*inputs, options.get("concatenate", True)).shape
        gradient = normal(*size, dtype=rounded or inputs[0].dtype)
    call, tensors = of_those_there(partial(function, **options), inputs)
    return outputs_and_gradients(call, tensors, gradient.double())


def norm_inputs(shape=(2, 3, 4, 5), dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    """Return feature, weight and bias of a batch norm; half-precision features have float32 parameters."""
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    dtypes, sizes = (dtype, parameters, parameters), (shape, shape[1:2], shape[1:2])
    feature, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, kind)
        for size, kind in zip(sizes, dtypes, strict=True)
    )
    return [feature.contiguous(memory_format=memory_format), weight, bias]


def running_statistics(inputs, seed=9):
    """Return a running mean and variance for :func:`norm_inputs`."""
    generator = torch.Generator().manual_seed(seed)
    mean, variance = torch.randn(2, *inputs[1].shape, generator=generator, dtype=torch.float64).to(inputs[1].detach())
    return mean, 0.5 + variance.square()


def norm_results(inputs, gradient=None, training=True, function=batch_norm_relu, rounded=None, **options):
    """Return the output, the gradients by feature, weight and bias, and the running statistics after it."""
    running = [tensor.clone() for tensor in running_statistics(inputs)]
    if gradient is None:
        gradient = normal(*inputs[0].shape, dtype=rounded or inputs[0].dtype)
    found = outputs_and_gradients(
        lambda *tensors: function(*tensors, *running, training=training, **options), inputs, gradient
    )
    return found + running


published_norm_results = partial(norm_results, backend="reference")


# batch, classes, height, width
SUMS_SHAPES = {
    "one class": (3, 1, 9, 14),
    "one pixel": (8, 1, 1, 1),
    "one row": (2, 1, 1, 37),
    "one column": (2, 1, 37, 1),
    "two classes": (3, 2, 7, 5),
    "three classes, odd sides": (2, 3, 11, 13),
    "five classes, one pixel": (8, 5, 1, 1),
    "seventeen classes": (1, 17, 6, 3),
    "empty batch": (0, 1, 4, 4),
    "empty batch of classes": (0, 3, 4, 4),
    "no pixels": (2, 1, 0, 5),
    "no pixels of classes": (2, 3, 4, 0),
}


def sums_inputs(batch, classes, height, width, dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    """Return logits, three times standard normal, and masks with every label."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, max(classes, 2), (batch, height, width), generator=generator, dtype=torch.uint8)
    return logits.to(DEVICE, dtype).contiguous(memory_format=memory_format), masks.to(DEVICE)


IGNORED = 255


def partly_ignored(logits, masks):
    """Return copies in which a third of the pixels and the whole last image are ignored and have no usable logits."""
    logits, masks = logits.clone(memory_format=torch.preserve_format), masks.clone()
    ignored = torch.arange(masks.numel(), device=DEVICE).view(masks.shape) % 3 == 1
    ignored[-1:] = True
    logits.movedim(1, -1)[ignored] = math.nan
    return logits, masks.masked_fill_(ignored, IGNORED)


def upstream_of_sums(logits, seed=7):
    """Return a gradient of the sums."""
    batch, classes = logits.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(4 if classes == 1 else 3, batch, classes, generator=generator, dtype=torch.float64)
    return gradient.to(DEVICE)


def sums_results(function, logits, masks, gradient=None, **options):
    """Return each row of the sums, the gradient by the logits, and the counts."""
    leaf = logits.detach().requires_grad_()
    sums, counts = function(leaf, masks, **options)
    gradient = upstream_of_sums(logits) if gradient is None else gradient
    (d_logits,) = torch.autograd.grad(sums, leaf, gradient.to(sums.dtype))
    return [*sums.detach().unbind(), d_logits], counts


def assert_sums_as_exact_as_the_reference(function, draws, **options):
    """Compare sums and gradient with the reference in float64, over several draws, and the counts with its own."""
    runs = {"function": [], "baseline": [], "oracle": []}
    for logits, masks in draws:
        found, counts = sums_results(function, logits, masks, **options)
        runs["function"].append(found)
        baseline, expected = sums_results(published_sums, logits, masks, **options)
        runs["baseline"].append(baseline)
        runs["oracle"].append(sums_results(published_sums, logits.double(), masks, **options)[0])
        assert torch.equal(counts, expected)
        assert counts.dtype == torch.float32
        assert found[-1].dtype == logits.dtype
    assert_within_budget(*([torch.stack(draws) for draws in zip(*run, strict=True)] for run in runs.values()))


def channels_of_a_wider_map(feature):
    return torch.cat([feature[:, :1], feature, feature[:, :2]], dim=1)[:, 1:-2]


def every_other_row(feature):
    return feature.repeat_interleave(2, dim=2)[:, :, ::2]


def every_other_column(feature):
    return feature.repeat_interleave(2, dim=3)[..., ::2]


def columns_of_a_wider_map(feature):
    return torch.cat([feature[..., :1], feature, feature[..., :2]], dim=3)[..., 1:-2]


def rows_inside_columns(feature):
    return feature.transpose(2, 3).clone(memory_format=torch.contiguous_format).transpose(2, 3)


def off_alignment(feature):
    memory = torch.cat([feature.new_zeros(1), torch.as_strided(feature, (feature.numel(),), (1,))])[1:]
    return torch.as_strided(memory, feature.shape, feature.stride(), 1)


def packed_tokens(feature):
    """Return a slice of (B, N, sum C) seen as a map, as the transformer leaves tokens."""
    rows = feature.flatten(2).transpose(1, 2)
    packed = torch.cat([rows[..., :2], rows, rows[..., :1]], dim=2)
    return packed[..., 2:-1].transpose(1, 2).unflatten(2, feature.shape[2:])


# The same numbers at other places in memory.
VIEWS = [
    channels_of_a_wider_map,
    every_other_row,
    every_other_column,
    columns_of_a_wider_map,
    rows_inside_columns,
    off_alignment,
    packed_tokens,
]
# Numbers that are read again and again, with strides of 0.
EXPANDED = {
    "one sample": lambda feature: feature[:1].expand_as(feature),
    "one pixel": lambda feature: feature[:, :, :1, :1].expand_as(feature),
    "one number": lambda feature: feature[:1, :1, :1, :1].expand_as(feature),
}
UPSTREAM = {
    "a sum": lambda gradient: gradient[:1, :1, :1, :1].expand_as(gradient),
    "a sum over pixels": lambda gradient: gradient[:, :, :1, :1].expand_as(gradient),
    "a sum over channels": lambda gradient: gradient[:, :1].expand_as(gradient),
    "a sum over rows": lambda gradient: gradient[:, :, :1].expand_as(gradient),
    "contiguous": lambda gradient: gradient.contiguous(),
    "channels last": lambda gradient: gradient.contiguous(memory_format=torch.channels_last),
    "channels of a wider map": channels_of_a_wider_map,
    "columns of a wider map": columns_of_a_wider_map,
    "every other column": every_other_column,
    "off alignment": off_alignment,
}


def copied(feature, memory_format):
    """Return the same numbers in memory of their own."""
    return torch.empty_like(feature, memory_format=memory_format).copy_(feature)


@dataclass(frozen=True)
class Operator:
    """A public operator on inputs as small as they can be and still be awkward.

    ``call`` takes the tensors that ``inputs`` returns, of which the first ``learning`` take gradients, and ``backend``.
    """

    name: str
    call: Callable
    inputs: Callable[[torch.dtype], list[torch.Tensor]]
    learning: int

    def outputs(self, inputs, backend="triton"):
        """Return the outputs as a list."""
        outputs = self.call(*inputs, backend=backend)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

    def results(self, inputs, backend="triton", call=None, view=lambda gradient: gradient):
        """Return the outputs, the gradients by the inputs that learn, and the other inputs, which it may change.

        ``view`` changes the random gradients of the outputs.
        """
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[: self.learning]]
        others = [tensor.clone() for tensor in inputs[self.learning :]]
        outputs = (replace(self, call=call) if call else self).outputs([*leaves, *others], backend)
        used = [output for output in outputs if output.requires_grad]
        gradients = [view(random_like(output).to(output.dtype)) for output in used]
        return [*(output.detach() for output in outputs), *torch.autograd.grad(used, leaves, gradients), *others]


def normal_of_sizes(*sizes, seeded=False):
    """Return a function of a dtype that draws a tensor of each size, and the seed of a dropout mask if ``seeded``."""

    def inputs(dtype):
        tensors = [normal(*size, dtype=dtype, seed=place) for place, size in enumerate(sizes)]
        return [*tensors, torch.tensor([20], device=DEVICE)] if seeded else tensors

    return inputs


def norm_and_running_inputs(shape, dtype):
    inputs = norm_inputs(shape, dtype, torch.channels_last)
    return [*inputs, *running_statistics(inputs)]


def norm_and_conv_bias_inputs(dtype):
    """Return feature, weight, bias, bias of the convolution, running mean and variance, count of batches."""
    inputs = norm_inputs((2, 3, 2, 3), dtype)
    count = torch.tensor(1, device=DEVICE)
    return [*inputs, normal(3, dtype=dtype), *running_statistics(inputs), count]


def of_a_convolution(feature, weight, bias, conv_bias, *running, function=batch_norm_relu, **options):
    *running, count = running
    return function(feature, weight, bias, *running, conv_bias=conv_bias, num_batches_tracked=count, **options)


def scores_inputs(dtype):
    """Return sums and counts of two images of 20 pixels in three classes, never in half precision."""
    sums, counts = published_sums(*sums_inputs(2, 3, 4, 5))
    return [sums if dtype == torch.float64 else sums.float(), counts]


SCALES = (2, 3)  # channels
ALIGNED_SCALES = (3, 5)  # rows of 16 bytes in half precision, where attention forms no map
OPERATORS = (
    Operator(
        "channel_attention",
        lambda query, key, value, seed, **options: channel_attention(
            query, key, value, ALIGNED_SCALES, dropout_p=0.3, seed=seed, **options
        ),
        normal_of_sizes((2, 2, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8), seeded=True),
        learning=3,
    ),
    Operator(
        "projected_channel_attention",
        lambda tokens, context, weight, first, second, seed, **options: projected_channel_attention(
            tokens, context, [first, second], weight, dropout_p=0.3, seed=seed, **options
        ),
        normal_of_sizes((2, 3, 8), (2, 3, 8), (2, 2, 8, 8), (2, 3, 3), (2, 5, 5), seeded=True),
        learning=5,
    ),
    Operator(
        "packed_linear",
        lambda tokens, *others, **options: packed_linear(tokens, others[:2], others[2:], **options),
        normal_of_sizes((2, 3, 5), (2, 4, 2), (2, 1, 3), (2, 4), (2, 1)),
        learning=5,
    ),
    Operator(
        "packed_mlp",
        lambda tokens, residual, *others, **options: packed_mlp(
            tokens, residual, others[:2], others[2:4], others[4:6], others[6:], **options
        ),
        normal_of_sizes((2, 3, 5), (2, 3, 5), (4, 2), (1, 3), (4,), (1,), (2, 4), (3, 1), (2,), (3,)),
        learning=10,
    ),
    Operator(
        "packed_layer_norm",
        lambda tokens, *channels, **options: packed_layer_norm(tokens, SCALES, *channels, eps=1e-3, **options),
        normal_of_sizes((2, 3, 5), (5,), (5,)),
        learning=3,
    ),
    Operator(
        "cross_layer_norm",
        lambda tokens, *channels, **options: cross_layer_norm(tokens, SCALES, *channels, eps=1e-3, **options),
        normal_of_sizes((2, 3, 5), (5,), (5,), (5,), (5,)),
        learning=5,
    ),
    Operator(
        "skip_gate",
        skip_gate,
        lambda dtype: gate_inputs(2, 2, 3, (1, 2), (2, 1), (2, 1), dtype, memory_format=torch.channels_last),
        learning=7,
    ),
    Operator(
        "batch_norm_relu",
        partial(batch_norm_relu, training=True),
        partial(norm_and_running_inputs, (2, 3, 2, 3)),
        learning=3,
    ),
    Operator(
        "batch_norm_relu_pool",
        partial(batch_norm_relu_pool, training=True),
        partial(norm_and_running_inputs, (2, 3, 3, 2)),
        learning=3,
    ),
    Operator(
        "segmentation_sums",
        segmentation_sums,
        lambda dtype: list(sums_inputs(2, 3, 3, 4, dtype, torch.channels_last)),
        learning=1,
    ),
    Operator(
        "segmentation_scores",
        lambda sums, counts, **options: segmentation_scores(sums, counts, 20, **options),
        scores_inputs,
        learning=1,
    ),
)
# The operators again, in the forms that optional arguments give them.
OTHER_FORMS = (
    Operator(
        "channel_attention without dropout",
        lambda query, key, value, **options: channel_attention(query, key, value, SCALES, **options),
        normal_of_sizes((1, 1, 3, 5), (1, 1, 3, 4), (1, 1, 3, 4)),
        learning=3,
    ),
    Operator(
        "packed_linear without heads and biases",
        lambda tokens, *weights, **options: packed_linear(tokens, weights, **options),
        normal_of_sizes((1, 3, 7), (4, 2), (1, 5)),
        learning=3,
    ),
    Operator(
        "skip_gate without tokens",
        lambda feature, *others, **options: skip_gate(feature, None, *others, **options),
        normal_of_sizes((1, 2, 2, 2), (1, 1, 1, 1), (2, 2), (2,), (2, 1), (2,)),
        learning=6,
    ),
    Operator(
        "skip_gate without decoder feature",
        lambda feature, tokens, weight, bias, **options: skip_gate(
            feature, tokens, None, weight, bias, None, None, **options
        ),
        normal_of_sizes((1, 2, 2, 2), (1, 2, 1, 2), (2, 2), (2,)),
        learning=4,
    ),
    Operator(
        "skip_gate alone",
        lambda feature, weight, bias, **options: skip_gate(feature, None, None, weight, bias, None, None, **options),
        normal_of_sizes((1, 2, 2, 2), (2, 2), (2,)),
        learning=3,
    ),
    Operator(
        "batch_norm_relu without running statistics",
        lambda *tensors, **options: batch_norm_relu(*tensors, None, None, training=True, **options),
        partial(norm_inputs, (2, 3, 2, 2)),
        learning=3,
    ),
    Operator(
        "batch_norm_relu with the bias of a convolution",
        partial(of_a_convolution, training=True),
        norm_and_conv_bias_inputs,
        learning=4,
    ),
    Operator(
        "batch_norm_relu_pool by given statistics with the bias of a convolution",
        partial(of_a_convolution, function=batch_norm_relu_pool, training=False),
        norm_and_conv_bias_inputs,
        learning=4,
    ),
    Operator(
        "batch_norm_relu by given statistics",
        partial(batch_norm_relu, training=False),
        partial(norm_and_running_inputs, (2, 3, 2, 2)),
        learning=3,
    ),
    Operator(
        "batch_norm_relu_pool by given statistics, its map alone",
        lambda *tensors, **options: batch_norm_relu_pool(*tensors, training=False, **options)[0],
        partial(norm_and_running_inputs, (2, 3, 3, 2)),
        learning=3,
    ),
    Operator(
        "batch_norm_relu_pool, its pooled map alone",
        lambda *tensors, **options: batch_norm_relu_pool(*tensors, training=True, **options)[1],
        partial(norm_and_running_inputs, (2, 3, 3, 2)),
        learning=3,
    ),
    Operator(
        "segmentation_sums of one class",
        segmentation_sums,
        lambda dtype: list(sums_inputs(2, 1, 3, 4, dtype)),
        learning=1,
    ),
    Operator(
        "segmentation_sums that ignore a label",
        partial(segmentation_sums, ignore_label=1),
        lambda dtype: list(sums_inputs(2, 3, 3, 4, dtype)),
        learning=1,
    ),
    Operator(
        "segmentation_scores of given totals",
        lambda sums, counts, totals, **options: segmentation_scores(sums, counts, 20, totals=totals, **options),
        lambda dtype: [*scores_inputs(dtype), torch.tensor([2.5, 31.0, 44.0], device=DEVICE)],
        learning=1,
    ),
)


def map_inputs(name, sizes, memory_format):
    """Return float32 inputs of the operator ``name`` on maps of ``sizes``: channels, height and width."""
    channels, *patch = sizes
    if name == "skip_gate":
        return gate_inputs(1, channels, 5, (1, 1), patch, (1, 1), torch.float32, memory_format=memory_format)
    if name == "segmentation_sums":
        return list(sums_inputs(2, *sizes, torch.float32, memory_format))
    inputs = norm_inputs((2, *sizes), torch.float32, memory_format)
    return [*inputs, *running_statistics(inputs)]
