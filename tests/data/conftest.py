"""The MoNuSeg folder, for tests that need the real images; they may not be part of the project."""

import os
from pathlib import Path

import pytest

VARIABLE = "UCTRANS_MONUSEG"


@pytest.fixture(scope="session")
def monuseg():
    folder = Path(os.environ.get(VARIABLE) or Path(__file__).parents[2] / "../shared/data/monuseg").resolve()
    if not (folder / "annotations").is_dir():
        pytest.skip(f"needs the MoNuSeg images; set {VARIABLE} to the folder of train, val, test and annotations")
    return folder
