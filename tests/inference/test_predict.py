"""Prediction on image files: what is written, and what is refused before anything is."""

import contextlib
import errno
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from skimage.io import imread, imsave

import uctrans
from uctrans.data import DataError, protocols
from uctrans.inference import InferenceError, PredictConfig, PredictionError, predict, writer
from uctrans.writing import FolderError, locked

SQUARE = np.zeros((20, 30, 3), dtype=np.uint8)
SQUARE[5:15, 10:20] = 255


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    imsave(folder / "square.png", SQUARE, check_contrast=False)
    imsave(folder / "wide.tif", np.full((8, 40), 255, dtype=np.uint8), check_contrast=False)
    imsave(folder / "dot.png", np.zeros((1, 1, 3), dtype=np.uint8), check_contrast=False)
    return folder


@pytest.fixture
def segment(use_model, brightness_model, tmp_path):
    """A function that predicts into the folder ``masks``, by default with the binary brightness model."""

    def run(source, model=None, **settings):
        use_model(model or brightness_model())
        settings = {"device": "cpu", "progress": False, "resolution": "native", **settings}
        return predict(PredictConfig("model", str(source), str(tmp_path / "masks"), **settings))

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_masks_and_overlays(segment, images, tmp_path):
    written = segment(images)
    out = tmp_path / "masks"
    assert names(out) == sorted(path.name for path in written)
    assert names(out) == [f"{name}{end}.png" for name in ("dot", "square", "wide") for end in ("", "_overlay")]
    mask = imread(out / "square.png")
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, SQUARE[..., 0])
    assert imread(out / "dot.png").shape == (1, 1)
    assert (imread(out / "wide.png") == 255).all()
    changed = (imread(out / "square_overlay.png") != SQUARE).any(-1)
    rim = (SQUARE[..., 0] > 0).copy()
    rim[6:14, 11:19] = False
    assert np.array_equal(changed, rim)


def test_one_image(segment, images):
    assert [path.name for path in segment(images / "wide.tif")] == ["wide.png", "wide_overlay.png"]


@pytest.mark.parametrize("resolution", ["protocol", "native"])
def test_a_real_model_on_every_size(resolution, unet_folder, images, tmp_path):
    settings = {"device": "cpu", "resolution": resolution, "tta": "flips", "tile": 16, "probability": "npy"}
    predict(PredictConfig(str(unet_folder), str(images), str(tmp_path / "masks"), **settings))
    for name, shape in {"square": (20, 30), "wide": (8, 40), "dot": (1, 1)}.items():
        assert imread(tmp_path / f"masks/{name}.png").shape == shape
        probabilities = np.load(tmp_path / f"masks/{name}_probability.npy")
        assert probabilities.shape == (1, *shape)
        assert probabilities.dtype == np.float32
        assert np.array_equal(imread(tmp_path / f"masks/{name}.png") == 255, probabilities[0] > 0.5)


class ThreePartModel(torch.nn.Module):
    """Background, interior or border wherever the image is dark, white or gray."""

    def __init__(self):
        super().__init__()
        self.name, self.in_channels, self.classes, self.config = "three", 3, 3, {"image_size": 16}
        self.metadata = {"protocol": "native", "target": "boundary"}

    def forward(self, image):
        centres = torch.tensor([0.0, 1.0, 0.5]).view(1, -1, 1, 1)
        return -500 * (image.mean(1, keepdim=True) - centres).square()


def test_instances_of_a_boundary_aware_model(segment, tmp_path):
    """Two nuclei that touch."""
    parts = np.zeros((24, 40), dtype=np.uint8)
    parts[4:20, 4:36] = 127
    parts[7:17, 7:17] = parts[7:17, 23:33] = 255
    imsave(tmp_path / "two.png", parts[..., None].repeat(3, -1), check_contrast=False)
    segment(tmp_path / "two.png", ThreePartModel(), instances=True, probability="png", resolution="protocol")
    out = tmp_path / "masks"
    endings = ("", "_instances", "_instances_overlay", "_overlay", "_probability")
    assert names(out) == [f"two{end}.png" for end in endings]
    instances = imread(out / "two_instances.png")
    assert instances.dtype == np.uint16
    assert np.unique(instances).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(instances > 0, parts > 0)
    assert (instances[:, :20].max(), instances[:, 20:].min(where=parts[:, 20:] > 0, initial=9)) == (1, 2)
    np.testing.assert_array_equal(imread(out / "two.png"), (parts > 0) * 255)
    assert imread(out / "two_probability.png")[parts > 0].min() > 250
    lines = (imread(out / "two_instances_overlay.png") != parts[..., None]).any(-1)
    assert lines[10, 19]  # the outline between the two, where the mask has none
    assert not (imread(out / "two_overlay.png") != parts[..., None]).any(-1)[10, 19]


def test_instances_of_a_binary_model(segment, images, tmp_path):
    assert len(segment(images, instances=True, smallest_object=50)) == 12
    np.testing.assert_array_equal(imread(tmp_path / "masks/square_instances.png") > 0, SQUARE[..., 0] > 0)
    segment(images, instances=True, smallest_object=101, overwrite=True)
    assert imread(tmp_path / "masks/square_instances.png").max() == 0


def test_more_nuclei_than_a_file_holds_stop_only_their_image(segment, brightness_model, tmp_path):
    (tmp_path / "images").mkdir()
    dots = np.zeros((520, 520), dtype=np.uint8)
    dots[::2, ::2] = 255
    for name, pixels in {"dots": dots, "square": SQUARE}.items():
        imsave(tmp_path / "images" / f"{name}.png", pixels, check_contrast=False)
    settings = {"instances": True, "smallest_object": 0, "seed_distance": 1}
    with pytest.raises(PredictionError, match="from 0 to 67600"):
        segment(tmp_path / "images", brightness_model(image_size=520), **settings)
    assert "square_instances.png" in names(tmp_path / "masks")
    assert not [name for name in names(tmp_path / "masks") if name.startswith("dots")]


def test_probability_picture(segment, images, tmp_path):
    segment(images, probability="png")
    assert np.array_equal(imread(tmp_path / "masks/square_probability.png"), SQUARE[..., 0])


def test_label_indices_and_palette_colours(brightness_model, segment, tmp_path):
    shades = np.array([[20, 127, 240]], dtype=np.uint8)[..., None].repeat(3, -1)
    imsave(tmp_path / "shades.png", shades, check_contrast=False)
    segment(tmp_path / "shades.png", brightness_model(classes=3), probability="png")
    assert imread(tmp_path / "masks/shades.png").tolist() == [[0, 1, 2]]
    assert imread(tmp_path / "masks/shades_probability.png").tolist() == [[0, 255, 255]]
    palette = {"palette": ["#000000", "#ff0000", "#0000ff"]}
    segment(tmp_path / "shades.png", brightness_model(classes=3, metadata=palette), overwrite=True)
    assert imread(tmp_path / "masks/shades.png").tolist() == [[[0, 0, 0], [255, 0, 0], [0, 0, 255]]]


def test_a_damaged_image_does_not_stop_the_others(segment, images, tmp_path):
    (images / "broken.png").write_bytes(b"no picture")
    with pytest.raises(PredictionError, match=r"1 images were not segmented, 6 files .*\n.*broken\.png") as caught:
        segment(images)
    assert list(caught.value.failures) == [images / "broken.png"]
    assert len(caught.value.written) == 6
    assert names(tmp_path / "masks") == sorted(path.name for path in caught.value.written)


def test_an_image_that_needs_too_much_memory_does_not_stop_the_others(segment, images, brightness_model):
    class Greedy(brightness_model):
        def forward(self, image):
            if image.shape[-2:] == (20, 30):
                torch.empty(2**58)
            return super().forward(image)

    with pytest.raises(PredictionError, match=r"png: out of memory: lower batch_size \(now 4\) or tile") as caught:
        segment(images, Greedy(), tile=64)
    assert list(caught.value.failures) == [images / "square.png"]
    assert sorted(path.stem for path in caught.value.written) == ["dot", "dot_overlay", "wide", "wide_overlay"]


def test_existing_files_are_kept(segment, images, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/square.png").write_bytes(b"mine")
    with pytest.raises(InferenceError, match=r"square\.png.*set overwrite"):
        segment(images)
    assert names(tmp_path / "masks") == ["square.png"]
    assert (tmp_path / "masks/square.png").read_bytes() == b"mine"
    segment(images, overwrite=True)
    assert imread(tmp_path / "masks/square.png").shape == (20, 30)


def test_two_images_of_one_name(segment, images, tmp_path):
    imsave(images / "square.tif", SQUARE, check_contrast=False)
    with pytest.raises(DataError, match=r"square\.tif"):
        segment(images)
    (images / "square.tif").unlink()
    imsave(images / "square_overlay.png", SQUARE, check_contrast=False)
    with pytest.raises(InferenceError, match=r"both write square_overlay\.png"):
        segment(images)
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("source", ["images", "images/square.png"])
def test_the_folder_of_the_images_is_no_output(source, images, tmp_path):
    before = names(images)
    with pytest.raises(InferenceError, match="holds the images themselves"):
        predict(PredictConfig("model", str(tmp_path / source), str(images / "../images"), overwrite=True))
    assert names(images) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": "jpg"}, "probability: 'jpg' is not known; choose one of none, png, npy"),
        ({"threshold": 0.0}, "threshold: 0.0 is out of range"),
        ({"tta": "all"}, "tta: 'all' is not known"),
        ({"resolution": "full"}, "resolution: 'full' is not known"),
        ({"instances": True, "smallest_object": -1}, "smallest_object: -1 is negative"),
        ({"instances": True, "seed_distance": 0}, "seed_distance: 0 is too small"),
    ],
)
def test_bad_settings(settings, message, segment, images, tmp_path):
    with pytest.raises(InferenceError, match=message):
        segment(images, **settings)
    assert not (tmp_path / "masks").exists()


def test_bad_paths(images, tmp_path):
    output = str(tmp_path / "masks")
    with pytest.raises(DataError, match="nothing-here"):
        predict(PredictConfig("model", str(tmp_path / "nothing-here"), output))
    with pytest.raises(uctrans.ModelFileError, match="nowhere"):
        predict(PredictConfig(str(tmp_path / "nowhere"), str(images), output, device="cpu", progress=False))
    with pytest.raises(InferenceError, match="is a file"):
        predict(PredictConfig("model", str(images), str(images / "dot.png")))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@contextlib.contextmanager
def full_disk(room):
    """Let ``room`` PNG files be written; of every further one, only half is."""
    write = pathlib.Path.write_bytes
    left = itertools.count(room, -1)

    def limited(path, content):
        if path.suffix != ".png" or next(left) > 0:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", limited)
        yield


@pytest.mark.parametrize("room", range(6))
def test_a_full_disk_leaves_whole_files_and_the_same_command_continues(room, segment, images, tmp_path):
    segment(images, probability="npy")
    out, journal = tmp_path / "masks", tmp_path / "masks/.uctrans-predict.jsonl"
    expected, noted = contents(out), journal.read_bytes()
    shutil.rmtree(out)
    with full_disk(room), pytest.raises(OSError, match="No space left") as caught:
        segment(images, probability="npy")
    found = contents(out)
    assert found.items() <= expected.items()
    assert len([name for name in found if name.endswith(".png")]) == room
    done = [name for name in ("dot", "square", "wide") if f"{name}.png" in found]
    assert caught.value.__notes__ == [f"{len(done)} of 3 images are done; the same command continues"]
    written = segment(images, probability="npy")
    assert (written.images, written.done_before) == (3 - len(done), len(done))
    assert contents(out) == expected
    assert journal.read_bytes() == noted


def test_a_repeated_command_adds_what_is_missing(segment, images, tmp_path):
    out = tmp_path / "masks"
    (images / "dot.png").rename(tmp_path / "dot.png")
    assert len(segment(images)) == 4
    expected = contents(out)
    again = segment(images)
    assert (list(again), again.done_before) == ([], 2)
    assert str(again) == f"Nothing to write into {out}. 2 images were done before."
    (out / "wide_overlay.png").unlink()
    assert [path.name for path in segment(images)] == ["wide.png", "wide_overlay.png"]
    assert contents(out) == expected
    (tmp_path / "dot.png").rename(images / "dot.png")
    added = segment(images)
    assert [path.name for path in added] == ["dot.png", "dot_overlay.png"]
    assert re.fullmatch(
        r"Wrote 2 files into .*masks: 1 images in [\d.]+ s, [\d.]+ images and [\d.]+ million pixels a second\. "
        r"2 images were done before\.",
        str(added),
    )


def test_a_repaired_image_is_added_by_the_same_command(segment, images, tmp_path):
    (images / "broken.png").write_bytes(b"no picture")
    with pytest.raises(PredictionError, match="then repeat the command"):
        segment(images)
    shutil.copy(images / "square.png", images / "broken.png")
    assert [path.name for path in segment(images)] == ["broken.png", "broken_overlay.png"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"threshold": 0.4}, "threshold: 0.5 there, 0.4 now"),
        ({"instances": True}, "instances: False there, True now"),
        ({"model": {"metadata": {"palette": ["#000000", "#ffffff"]}}}, "weights: [0-9a-f]+ there, [0-9a-f]+ now"),
    ],
)
def test_predictions_of_other_settings_are_not_mixed(changes, named, segment, images, brightness_model, tmp_path):
    segment(images / "dot.png")
    if "model" in changes:
        changes = {"model": brightness_model(**changes["model"])}
    before = contents(tmp_path / "masks")
    with pytest.raises(InferenceError, match=f"another model or of other settings .{named}"):
        segment(images, **changes)
    assert contents(tmp_path / "masks") == before
    segment(images, **changes, overwrite=True)
    for path in (tmp_path / "masks").glob("*.png"):
        path.unlink()
    segment(images)  # there is nothing left to mix with


def test_other_devices_and_batches_continue(segment, images):
    segment(images / "dot.png")
    assert segment(images, batch_size=1, backend="auto", graph=False).done_before == 1


def test_files_of_the_prediction_that_is_replaced_go(segment, images, tmp_path):
    segment(images, instances=True, probability="npy")
    (tmp_path / "masks/square_mine.png").write_bytes(b"mine")
    segment(images, probability="png", overwrite=True)
    kinds = ("", "_overlay", "_probability")
    assert names(tmp_path / "masks") == sorted(
        ["square_mine.png", *(f"{name}{kind}.png" for name in ("dot", "square", "wide") for kind in kinds)]
    )


def test_an_overwriting_command_continues_without_the_switch(segment, images, tmp_path):
    segment(images)
    with full_disk(3), pytest.raises(OSError, match="No space left") as caught:
        segment(images, threshold=0.4, overwrite=True)
    assert caught.value.__notes__ == ["1 of 3 images are done; the same command without --overwrite continues"]
    assert segment(images, threshold=0.4).done_before == 1


def test_the_same_name_from_another_folder_is_another_image(segment, images, tmp_path):
    segment(images)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy2(images / "square.png", other / "square.png")
    with pytest.raises(InferenceError, match=r"square\.png.*exist already"):
        segment(other)
    imsave(images / "square.png", 255 - SQUARE, check_contrast=False)  # so is another content
    with pytest.raises(InferenceError, match=r"square\.png.*exist already"):
        segment(images)


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b"\xff\n[1]\n",
        b'{"settings": [1]}\n{"name": "dot", "entry": 3}\n{"name": "dot"}\n{"name": "dot", "ent',
        b"[" * 100_000,
    ],
    ids=["empty", "foreign", "torn", "deep"],
)
def test_a_damaged_journal_is_none(journal, segment, images, tmp_path):
    segment(images)
    (tmp_path / "masks/.uctrans-predict.jsonl").write_bytes(journal)
    with pytest.raises(InferenceError, match="exist already"):
        segment(images)
    assert len(segment(images, overwrite=True)) == 6


def test_a_forged_journal_removes_no_other_file(segment, images, tmp_path):
    segment(images)
    journal = tmp_path / "masks/.uctrans-predict.jsonl"
    (tmp_path / "mine.png").write_bytes(b"mine")
    (tmp_path / "masks/mine.png").write_bytes(b"mine")
    journal.write_text(journal.read_text().replace('"dot_overlay.png"', '"../mine.png", "mine.png"'))
    segment(images, overwrite=True)
    assert (tmp_path / "mine.png").exists()
    assert (tmp_path / "masks/mine.png").exists()


def test_two_predictions_into_one_folder(segment, images, tmp_path):
    with locked(tmp_path / "masks"), pytest.raises(FolderError, match="is in use by process"):
        segment(images)
    assert len(segment(images)) == 6


@pytest.mark.parametrize("link", [pathlib.Path.symlink_to, pathlib.Path.hardlink_to])
@pytest.mark.parametrize("linked", ["input", "output"])
def test_an_original_is_not_replaced_through_a_link(link, linked, segment, images, tmp_path):
    """The link is in the folder of the images, or in that of the masks."""
    out = tmp_path / "masks"
    out.mkdir()
    original, alias = (out, images) if linked == "input" else (images, out)
    if linked == "input":
        (images / "square.png").rename(out / "square.png")
    link(alias / "square.png", original / "square.png")
    before = (original / "square.png").read_bytes()
    with pytest.raises(InferenceError, match=r"holds the images themselves|square\.png itself"):
        segment(images, overwrite=True)
    assert (original / "square.png").read_bytes() == before
    assert (alias / "square.png").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("data/test/images", "data/test/masks"),
        ("data/test/images/all.png", "data/test/masks"),
        ("data/test/images", "data/test/instances"),
        ("data/test/images", "link"),
        ("copy", "data/test/masks"),
        ("copy", "data/test/images"),
        ("published/Test_Folder/img", "published/Test_Folder/labelcol"),
    ],
)
def test_the_truth_of_a_data_set_is_no_output(source, output, dataset, use_model, brightness_model, tmp_path):
    use_model(brightness_model())
    shutil.copytree(dataset / "test/masks", dataset / "test/instances")
    (dataset / "test/instances/all.png").unlink()
    shutil.copytree(dataset / "test/images", tmp_path / "copy")
    shutil.copytree(dataset / "test/images", tmp_path / "published/Test_Folder/img")
    shutil.copytree(dataset / "test/masks", tmp_path / "published/Test_Folder/labelcol")
    (tmp_path / "link").symlink_to(dataset / "test/masks")
    before = contents(tmp_path / output)
    with pytest.raises(InferenceError, match=r"of a data set; choose another folder|holds the images"):
        predict(PredictConfig("m", str(tmp_path / source), str(tmp_path / output), device="cpu", overwrite=True))
    assert contents(tmp_path / output) == before


def test_masks_beside_images_may_be_a_prediction(segment, images, tmp_path):
    segment(images)  # into the folder masks, which is beside the folder images
    (tmp_path / "masks/.uctrans-predict.jsonl").unlink()  # as earlier versions did not have it
    assert len(segment(images, overwrite=True)) == 6


@pytest.mark.parametrize("name", ["a" * 251, "腺" * 79, "é" * 125], ids=["251 letters", "79 CJK letters", "250 bytes"])
def test_a_name_too_long_for_its_results_costs_one_image(name, segment, images, tmp_path):
    shutil.copy(images / "square.png", images / f"{name}.png")
    too_long = len(f"{name}_overlay.png".encode()) > 255
    if too_long:
        with pytest.raises(PredictionError, match=r"1 images .*\n.*_overlay\.png cannot be the name"):
            segment(images)
    else:
        assert len(segment(images)) == 8
    assert len(names(tmp_path / "masks")) == (6 if too_long else 8)


def test_the_next_image_is_read_and_the_last_one_written_while_the_network_runs(
    brightness_model, segment, tmp_path, monkeypatch
):
    (tmp_path / "many").mkdir()
    for number in range(4):
        imsave(tmp_path / f"many/{number}.png", SQUARE, check_contrast=False)
    read, written = ([threading.Event() for _ in range(5)] for _ in range(2))
    reads, writes, runs = itertools.count(), itertools.count(), itertools.count()
    decode, write = protocols.decode_image, writer.overlay

    def decode_image(*arguments):
        read[next(reads)].set()
        return decode(*arguments)

    def overlay(*arguments):
        written[next(writes)].set()
        return write(*arguments)

    class Waiting(brightness_model):
        def forward(self, image):
            number = next(runs)
            assert number == 3 or read[number + 1].wait(20)
            assert number == 0 or written[number - 1].wait(20)
            assert threading.current_thread() is threading.main_thread()
            return super().forward(image)

    monkeypatch.setattr(protocols, "decode_image", decode_image)
    monkeypatch.setattr(writer, "overlay", overlay)
    written_files = segment(tmp_path / "many", Waiting(), resolution="protocol")
    assert [path.name for path in written_files][::2] == ["0.png", "1.png", "2.png", "3.png"]


def test_memory_does_not_grow_with_the_folder(segment, tmp_path):
    peaks = []
    for count in (4, 24):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            imsave(folder / f"{count}-{number}.png", np.zeros((300, 300, 3), dtype=np.uint8), check_contrast=False)
        tracemalloc.start()
        segment(folder, resolution="protocol")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_network_that_stops_leaves_whole_files(stop, brightness_model, segment, images, tmp_path):
    class Stopping(brightness_model):
        def forward(self, image):
            if len(self.seen) == 2:
                raise stop("stopped")
            return super().forward(image)

    with pytest.raises(stop, match="stopped"):
        segment(images, Stopping(), resolution="protocol")
    assert "dot.png" in names(tmp_path / "masks")
    found = contents(tmp_path / "masks")
    segment(images, resolution="protocol")
    assert found.items() <= contents(tmp_path / "masks").items()
    assert len(names(tmp_path / "masks")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_command_that_is_stopped_at_any_moment_continues(number, unet_folder, tmp_path):
    (tmp_path / "images").mkdir()
    for name in range(40):
        imsave(tmp_path / f"images/{name}.png", np.roll(SQUARE, name, axis=1), check_contrast=False)
    words = [sys.executable, "-m", "uctrans", "predict", "-i", tmp_path / "images", "--model", unet_folder]
    words += ["--device", "cpu", "--no-progress", "--probability", "npy", "-o"]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(uctrans.__file__).parents[1])}

    def start(output):
        return subprocess.Popen([*words, tmp_path / output], env=environment, stderr=subprocess.PIPE, text=True)

    assert start("whole").wait() == 0
    expected = contents(tmp_path / "whole")
    for files in (1, 30):
        process = start("stopped")
        while process.poll() is None and len(list((tmp_path / "stopped").glob("*.npy"))) < files:
            time.sleep(0.001)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode in (0, 128 + number, -signal.SIGKILL), errors
        if process.returncode > 0:
            assert re.search(r"; \d+ of 40 images are done; the same command continues\n", errors)
        assert contents(tmp_path / "stopped").items() <= expected.items()
    assert start("stopped").wait() == 0
    assert contents(tmp_path / "stopped") == expected
    assert (tmp_path / "stopped/.uctrans-predict.jsonl").read_bytes() == (
        tmp_path / "whole/.uctrans-predict.jsonl"
    ).read_bytes()
    assert len(list((tmp_path / "stopped").iterdir())) == 121
