"""The MoNuSeg folder, for tests that need the real images; their licence keeps them out of the project."""

import os
from pathlib import Path

import pytest

VARIABLE = "UCTRANS_MONUSEG"


@pytest.fixture(scope="session")
def monuseg():
    folder = Path(os.environ.get(VARIABLE, "")).resolve()
    if not (folder / "annotations").is_dir():
        pytest.skip(f"needs the MoNuSeg images; set {VARIABLE} to the folder of train, val, test and annotations")
    return folder
