"""Images are known again by their pixels."""

import numpy as np
import pytest

from uctrans.data import find_samples, fingerprint, get_protocol, load_native, load_tensors
from uctrans.data.fingerprints import find_known, join_records


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_size_and_pixels_decide():
    image = noise(6, 4, 3)
    assert fingerprint(image) == fingerprint(image.copy())
    assert len(fingerprint(image)) == 16
    others = [image[:, ::-1], image.reshape(4, 6, 3), image.transpose(1, 0, 2), noise(6, 4, 3, seed=1)]
    assert fingerprint(image) not in map(fingerprint, others)


@pytest.mark.parametrize("rows", [1, 256, 257, 1000])
def test_every_pixel_counts(rows):
    image = noise(rows, 3, 3)
    for row in {0, 1, rows // 2, rows - 1} & set(range(rows)):
        for column in (0, 2):
            changed = image.copy()
            changed[row, column, 1] ^= 1
            assert fingerprint(changed) != fingerprint(image)


def test_both_ways_to_load_give_the_fingerprints_of_the_files(tmp_path):
    from uctrans.data import read_image, write_demo_dataset

    write_demo_dataset(tmp_path)
    samples = find_samples(tmp_path, "val")[:2]
    expected = [fingerprint(read_image(sample.image)) for sample in samples]
    assert load_tensors(samples, get_protocol(image_size=8), 1).fingerprints == expected
    assert load_native(samples, 1).fingerprints == expected


def test_records_join_and_training_counts_before_validation():
    record = join_records([{"train": {"1": "a"}, "val": {"2": "b"}}, {"train": {"2": "c"}, "val": {"3": "a"}}])
    assert record == {"train": {"1": "a", "2": "c"}, "val": {"2": "b", "3": "a"}}
    known = find_known(record, ["x", "y", "z", "a"], ["3", "2", "1", "4"])
    assert known == {"train": {"y": "c", "z": "a"}, "val": {"x": "a"}}
