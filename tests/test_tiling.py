"""Tiles of an image a few rows at a time are those of the whole image."""

import pytest
import torch

from uctrans.tiling import mean_of_rows, tiled, tiled_rows


def network(images):
    """Depend on the place in the tile, so that every tile shows in the result."""
    rows = torch.linspace(0, 1, images.shape[-2]).view(-1, 1)
    columns = torch.linspace(0, 1, images.shape[-1])
    return torch.cat([images.mean(1, keepdim=True) + rows, images[:, :1] * columns], 1).sigmoid()


@pytest.mark.parametrize("size", [(40, 56), (33, 70), (16, 16), (16, 50), (50, 16), (7, 50), (50, 7), (9, 9)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.7])
def test_rows_of_tiles_are_the_rows_of_the_whole(size, overlap):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    asked = []

    def read(top, bottom):
        asked.append((top, bottom))
        return image[:, top:bottom]

    settings = {"tile": (16, 12), "batch_size": 3, "overlap": overlap}
    parts = list(tiled_rows(network, read, size, **settings))
    expected = tiled(network, image[None], **settings)[0]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-6, rtol=0)
    assert asked == sorted(asked)
    assert max(bottom - top for top, bottom in asked) <= 16
    assert max(part.shape[1] for part in parts) <= 16


@pytest.mark.parametrize("mirrored", [(True, False), (False, True), (True, True)])
def test_tiles_from_the_other_side(mirrored):
    image = torch.rand(3, 37, 45, generator=torch.Generator().manual_seed(0))
    axes = [axis for axis, is_mirrored in zip((-2, -1), mirrored, strict=True) if is_mirrored]

    def mirrored_network(images):
        return network(images.flip(axes)).flip(axes)

    parts = tiled_rows(
        mirrored_network, lambda top, bottom: image[:, top:bottom], (37, 45), (16, 16), 2, 0.25, mirrored
    )
    expected = tiled(network, image.flip(axes)[None], (16, 16), 2)[0].flip(axes)
    torch.testing.assert_close(torch.cat(list(parts), 1), expected, atol=1e-6, rtol=0)


def test_mean_of_streams_that_are_cut_at_other_rows():
    first, second = torch.rand(2, 1, 10, 3)
    streams = [iter(first.split([4, 6], 1)), iter(second.split([1, 2, 7], 1))]
    parts = list(mean_of_rows(streams))
    assert [part.shape[1] for part in parts] == [1, 2, 1, 6]
    torch.testing.assert_close(torch.cat(parts, 1), (first + second) / 2)
