import copy

import pytest
import torch

import uctrans
from uctrans.inference.precision import keep_weights_cast


def network(name, **options):
    torch.manual_seed(0)
    options = {"base_channels": 4, **options}
    if name != "unet":
        options |= {"image_size": 48, "num_layers": 2, "num_heads": 2}
    model = uctrans.create_model(name, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # no two alike, no zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {}),
        ("uctransnet", {"backend": "composed"}),
        ("uctransnet", {"backend": "reference"}),
        ("dual_branch_uctransnet", {"backend": "composed"}),
        ("dual_branch_uctransnet", {"backend": "reference"}),
    ],
)
@torch.no_grad()
def test_outputs_under_autocast_are_the_same_to_the_bit(name, options, dtype):
    model = network(name, **options)
    cast = keep_weights_cast(copy.deepcopy(model), dtype)
    image = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype, cache_enabled=False):
        assert torch.equal(cast(image), model(image))


@torch.no_grad()
def test_outputs_of_the_triton_operators_are_the_same_to_the_bit():
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)
    model = network("uctransnet", backend="triton").to(device)
    cast = keep_weights_cast(copy.deepcopy(model), dtype)
    image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device, dtype, cache_enabled=False):
        assert torch.equal(cast(image), model(image))


@pytest.mark.parametrize("name", ["unet", "uctransnet", "dual_branch_uctransnet"])
def test_what_autocast_leaves_alone_stays_in_float32(name):
    model = keep_weights_cast(network(name), torch.bfloat16)
    kept = {key for key, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert all(word in "\n".join(kept) for word in (["norm", "position", "gate"] if name != "unet" else ["norm"]))
    cast = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert cast > 0.8 * sum(p.numel() for p in model.parameters())
