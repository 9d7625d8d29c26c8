"""Pictures and tables of the networks: they are those of the code, true to a real forward pass, and can be read."""

import functools
import itertools
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import uctrans
from uctrans.models import registry
from uctrans.models.base import SegmentationModel
from uctrans.models.drawing import draw, table, trace_model, with_tables
from uctrans.models.drawing.__main__ import main
from uctrans.models.drawing.layout import arrange
from uctrans.models.drawing.places import BOLD_WIDTH, PLAIN_WIDTH
from uctrans.models.drawing.routes import wires_of
from uctrans.models.drawing.tables import EQUATIONS
from uctrans.models.drawing.trace import fold_repeats

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
SVG = "{http://www.w3.org/2000/svg}"
SMALL = {
    "dual_branch_uctransnet": {"base_channels": (5, 4, 6, 10), "image_size": (32, 64), "num_heads": 2, "dilations": 1},
    "unet": {"base_channels": (5, 3, 7, 4), "in_channels": 2, "classes": 3},
    "uctransnet": {"base_channels": (5, 3, 7, 4), "image_size": (32, 64), "num_heads": 2},
}
AWKWARD = [
    ("unet", {"skips": (2, 4), "base_channels": (3, 1000, 7, 2048)}),
    ("unet", {"skips": ()}),
    ("uctransnet", {}),
    ("uctransnet", {"patch_sizes": (8,)}),
    ("uctransnet", {"patch_sizes": (32, 16, 8, 4, 2), "base_channels": 512, "image_size": (64, 1024)}),
    ("dual_branch_uctransnet", {}),
    ("dual_branch_uctransnet", {"depths": (1, 0, 2, 0), "dilations": (1, 2, 3, 4)}),
    ("dual_branch_uctransnet", {"depths": (4, 3, 2, 3)}),
    ("dual_branch_uctransnet", {"patch_sizes": (4, 2), "depths": (7, 1), "num_layers": 1}),
]


def test_pictures_and_tables_are_those_of_the_code(tmp_path):
    shutil.copy(PAGE, tmp_path / "models.md")
    assert main(["--output", str(tmp_path / "models")]) == 0
    kept = {path.name: path.read_text(encoding="utf-8") for path in (PAGE.parent / "models").iterdir()}
    made = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "models").iterdir()}
    assert sorted(kept) == [f"{name}.svg" for name in uctrans.list_models()]
    assert kept == made, "`make pictures` rewrites docs/models"
    tables = (tmp_path / "models.md").read_text(encoding="utf-8")
    assert tables == PAGE.read_text(encoding="utf-8"), "`make pictures` rewrites docs/models.md"


@functools.cache
def traced(name, **options):
    return trace_model(name, **options)


def groups_of(picture, kind):
    """Elements of a class by their name."""
    return {
        group.get("id"): group
        for group in ElementTree.fromstring(picture).iter(f"{SVG}g")
        if group.get("class") == kind
    }


def arrows_of(picture):
    arrows = ElementTree.fromstring(picture).iter(f"{SVG}path")
    return {(arrow.get("data-from"), arrow.get("data-to")) for arrow in arrows if arrow.get("class") == "arrow"}


class TestTrace:
    @pytest.mark.parametrize("name", SMALL)
    def test_shapes_are_those_of_a_forward_pass(self, name):
        """On real tensors, with a hook on every box: its shapes are those of what the module took and returned."""
        trace = traced(name, **SMALL[name])
        model = uctrans.create_model(name, **SMALL[name]).eval()
        if name != "unet":
            uctrans.set_backend(model, "reference")
        returned, taken = {}, {}

        def keep(path):
            def hook(module, inputs, named_inputs, output):
                output = output[0] if isinstance(output, tuple) else output
                returned[path] = tuple(output.shape[1:])
                taken[path] = [
                    tuple(value.shape[1:]) for value in [*inputs, *named_inputs.values()] if value is not None
                ]

            return hook

        boxes = {path: node for path, node in trace.nodes.items() if node.module}
        for path in boxes:
            model.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True)
        with torch.no_grad():
            logits = model(torch.rand(trace.image)[None])
        assert len(boxes) > 9
        assert {path: node.shape for path, node in boxes.items()} == returned
        for path, node in boxes.items():
            assert sorted(edge.shape for edge in node.inputs) == sorted(taken[path]), path
        assert trace.nodes["logits"].shape == tuple(logits.shape[1:])

    @pytest.mark.parametrize("name", SMALL)
    def test_counts_add_up(self, name):
        trace = traced(name, **SMALL[name])
        parts = [*trace.nodes.values(), *trace.groups.values()]
        model = uctrans.create_model(name, **SMALL[name])
        assert sum(part.parameters for part in parts) == sum(value.numel() for value in model.parameters())
        assert sum(part.flop for part in parts) == trace.flop > 0
        assert min(part.parameters for part in parts) >= 0

    def test_what_feeds_what(self):
        nodes = traced("dual_branch_uctransnet", **SMALL["dual_branch_uctransnet"]).nodes

        def feeding(name):
            return {(edge.source, *edge.via) for edge in nodes[name].inputs}

        assert feeding("encoder.nested.0.add") == {("encoder.stem",), ("encoder.nested.0.up.0",)}
        assert feeding("encoder.stages.0.dilated") == {("encoder.nested.0.add", "max-pool")}
        assert feeding("encoder.stages.0.cat") == {("encoder.stages.0.regular",), ("encoder.stages.0.dilated",)}
        assert feeding("transformer.cat") == {(f"transformer.embeddings.{scale}",) for scale in range(4)}
        assert feeding("transformer.layers.0.attention") == {("transformer.cat", "layer norm")}
        assert feeding("decoder.2.gate") == {
            ("encoder.nested.2.add",),
            ("transformer.reconstructions.2",),
            ("decoder.3.convs",),
        }


class TestPicture:
    @pytest.mark.parametrize("name", SMALL)
    def test_boxes_say_what_was_traced(self, name):
        trace = traced(name, **SMALL[name])
        picture = draw(trace)
        boxes = {
            path: [text.text for text in box.iter(f"{SVG}text")] for path, box in groups_of(picture, "block").items()
        }
        assert boxes.keys() == {path for path, node in fold_repeats(trace).nodes.items() if node.module}
        for path, (words, *_, shape) in boxes.items():
            node = trace.nodes[path]
            assert words == node.kind
            sides = reversed(node.shape) if len(node.shape) == 2 else node.shape
            assert shape.removesuffix(" tokens") == " × ".join(map(str, sides))

    @pytest.mark.parametrize("skips", [(1, 2, 3, 4), (1,), (4, 2), ()], ids=str)
    def test_a_removed_skip_is_gone(self, skips):
        picture = draw(trace_model("unet", base_channels=4, skips=skips))
        encoder = ["encoder.stem", *(f"encoder.stages.{stage}" for stage in range(4))]
        across = {
            (source, target) for source, target in arrows_of(picture) if (source[:3], target[:3]) == ("enc", "dec")
        }
        assert across == {(encoder[skip - 1], f"decoder.{skip - 1}") for skip in skips} | {(encoder[4], "decoder.3")}

    def test_widths_and_repeats_show(self):
        picture = draw(trace_model("uctransnet", base_channels=(6, 10, 14, 22), num_layers=3, image_size=32))
        assert "14 × 8 × 8" in picture
        assert "52 × 4 tokens" in picture
        titles = [next(panel.iter(f"{SVG}text")).text for panel in groups_of(picture, "group").values()]
        assert titles == ["TransformerLayer × 3"]

    def test_dilations_show(self):
        picture = draw(trace_model("dual_branch_uctransnet", base_channels=4, dilations=(1, 2, 3, 4)))
        blocks = groups_of(picture, "block")
        said = [list(blocks[f"encoder.stages.{stage}.dilated"].iter(f"{SVG}text"))[1].text for stage in range(4)]
        assert said == ["× 2", "× 2, dilation 2", "× 2, dilation 3", "× 2, dilation 4"]

    @pytest.mark.parametrize(("name", "options"), AWKWARD, ids=str)
    def test_nothing_covers_anything(self, name, options):
        trace = fold_repeats(traced(name, **options))
        layout = arrange(trace)
        for (one, place), (other, near) in itertools.combinations(layout.places.items(), 2):
            assert not meet(place, near), f"{one} and {other}"
        for (panel, place), (path, near) in itertools.product(layout.panels.items(), layout.places.items()):
            assert meet(place, near) == (trace.nodes[path].group == panel), f"{panel} and {path}"
        for (one, place), (other, near) in itertools.combinations(layout.panels.items(), 2):
            assert not meet(place, near), f"{one} and {other}"
        for place in layout.places.values():
            assert place.x >= 0 and place.y > 30 and place.right <= layout.width and place.bottom <= layout.height
        wires = wires_of(layout)
        assert {(wire.source, wire.target) for wire in wires} == {
            (edge.source, node.name) for node in trace.nodes.values() for edge in node.inputs
        }
        for wire, (path, place) in itertools.product(wires, layout.places.items()):
            for (x, y), (end_x, end_y) in itertools.pairwise(wire.points):
                assert (x == end_x) != (y == end_y)
                is_apart = max(x, end_x) <= place.x or min(x, end_x) >= place.right
                assert is_apart or max(y, end_y) <= place.y or min(y, end_y) >= place.bottom, f"{wire} runs into {path}"

    @pytest.mark.parametrize(("name", "options"), AWKWARD, ids=str)
    def test_text_fits_its_box(self, name, options):
        picture = draw(traced(name, **options))
        for path, box in groups_of(picture, "block").items():
            place = next(box.iter(f"{SVG}rect"))
            for text in box.iter(f"{SVG}text"):
                width = len(text.text) * (BOLD_WIDTH if text.get("font-weight") else PLAIN_WIDTH)
                assert width <= float(place.get("width")) - 8, path
                top = float(place.get("y"))
                assert top + 11 <= float(text.get("y")) <= top + float(place.get("height")) - 4, path

    def test_its_background_is_opaque(self):
        root = ElementTree.fromstring(draw(trace_model("unet", base_channels=2)))
        background = next(root.iter(f"{SVG}rect"))
        assert background.get("fill") == "#ffffff"
        assert (background.get("width"), background.get("height")) == (root.get("width"), root.get("height"))


def meet(place, other):
    is_beside = place.right <= other.x or other.right <= place.x
    return not is_beside and place.y < other.bottom and other.y < place.bottom


class TestPage:
    def test_rows_add_up_to_the_sum(self):
        for line in PAGE.read_text(encoding="utf-8").split("<!-- blocks:")[1:]:
            rows = [row.split(" | ") for row in line.partition("<!-- /")[0].splitlines() if row.startswith("| ")]
            *counts, total = [re.sub(r"\D", "", row[4]) for row in rows[2:]]
            assert sum(int(count or 0) for count in counts) == int(total)

    def test_links_lead_somewhere(self):
        text = PAGE.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text)
        assert len(links) > 20
        for file, anchor in links:
            path = PAGE.parent / file if file else PAGE
            assert path.exists(), file
            if anchor:
                headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{file}#{anchor}"

    def test_every_equation_is_used(self):
        text = PAGE.read_text(encoding="utf-8")
        unused = [name for name in EQUATIONS if f"[{name}](" not in text and f"`{name}`" not in text]
        assert unused == []

    def test_a_page_without_a_place_for_a_table(self):
        with pytest.raises(ValueError, match=r"no one place for the table of unet: give it <!-- blocks:unet -->"):
            with_tables("# Models\n", {"unet": trace_model("unet", base_channels=2)})


class Odd(SegmentationModel):
    """A network that names its parts otherwise, of a block that nobody described."""

    name = "odd"

    def __init__(self, in_channels: int = 3, width: int = 2):
        super().__init__()
        self.in_channels = in_channels
        self.encoder = nn.Conv2d(in_channels, width, 1)
        self.tail = nn.PReLU()

    def forward(self, image):
        return self.tail(self.encoder(image))


def test_a_network_that_has_no_place(monkeypatch):
    monkeypatch.setitem(registry._MODELS, "odd", Odd)
    trace = trace_model("odd")
    with pytest.raises(ValueError, match=r"Odd has 'tail', and only blocks of image, encoder, .* have a place"):
        draw(trace)
    with pytest.raises(ValueError, match="PReLU has no equation: add what it computes to EQUATIONS"):
        table(trace)


class TestCommand:
    def test_one_model_with_options(self, tmp_path):
        words = ["--model", "unet", "--options", '{"skips": [1], "base_channels": 3}']
        assert main(["--output", str(tmp_path / "pictures"), *words]) == 0
        assert [path.name for path in tmp_path.rglob("*.*")] == ["unet.svg"]
        assert "24 × 28 × 28" in (tmp_path / "pictures" / "unet.svg").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "unt"], "unknown model 'unt'; did you mean 'unet'?"),
            (["--model", "unet", "--options", "{"], "--options: not JSON"),
            (["--model", "unet", "--options", "[1]"], "--options: must be an object of options; got [1]"),
            (["--model", "unet", "--options", '{"skip": [1]}'], "unet has no option 'skip'; did you mean 'skips'?"),
            (["--model", "unet", "--options", '{"skips": [5]}'], "skips must be different numbers of 1 to 4"),
            (["--options", '{"skips": [1]}'], "--options are those of one model: name it with --model"),
            ([], "the page of the tables, is not there"),
        ],
        ids=str,
    )
    def test_refuses(self, words, message, tmp_path, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["--output", str(tmp_path / "pictures"), *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
