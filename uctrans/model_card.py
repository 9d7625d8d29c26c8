"""Model cards: what a README.md beside shared weights says, with the front matter that the Hugging Face hub reads."""

import hashlib
import re
import shlex
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from uctrans.extras import import_extra
from uctrans.inference import mean_and_deviation
from uctrans.inference.evaluate import TITLES
from uctrans.writing import written_atomically

CARD, FOLDS = "README.md", "folds.json"
TASK = {"type": "image-segmentation", "name": "Image segmentation"}
NO_LICENSE = (
    "# license: not set. Whoever shares these weights names one, which the licence of the images may decide:\n"
    "# https://huggingface.co/docs/hub/repositories-licenses\n"
)
STAMP_NOTE = ": of the text above as it was written, which tells whether it was edited"
STAMP = re.compile(rf"\n<!-- uctrans ([0-9a-f]{{16}}){STAMP_NOTE} -->\s*\Z")
DIGITS = 6
OF_PREDICTOR = ("resolution", "tta", "channel_order")  # settings in words that load_predictor takes


@dataclass(frozen=True)
class CardScores:
    """How the weights did, and the runs that they are one of.

    Attributes:
        means: mean over the images by score; None where it is defined for none.
        counts: number of images that each mean goes over; where one is missing, ``images``.
        images: of the split.
        split: test, train or val.
        scored_at: the pixels that were counted, in words.
        flags: of ``uctrans predict``, where images were predicted otherwise than by default.
        runs: by score one mean for each run of the same network and settings; empty where only this one is known.
    """

    means: dict[str, float | None]
    counts: dict[str, int]
    images: int
    split: str
    scored_at: str
    flags: str = ""
    runs: dict[str, list[float]] = field(default_factory=dict)

    def defined(self) -> list[tuple[str, str, float, int]]:
        """Key, title, mean and number of images of every score that is defined."""
        return [
            (key, title, self.means[key], self.counts.get(key, self.images))
            for key, title in TITLES.items()
            if self.means.get(key) is not None
        ]


@dataclass(frozen=True)
class ModelCard:
    """What is known of shared weights; ``str()`` of it is the card.

    Attributes:
        title: what the card calls the model.
        model: what config.json holds.
        checksum: SHA-256 of the weights, hexadecimal.
        selection: how it came to these weights and not to others, in sentences.
        command: what trains a model like it, None where that is not known.
        dataset: name of the images that it was trained on, None where that is not known.
        fingerprint: of their names and sizes, see `uctrans.study.checks.fingerprint`.
        scores: None where there are none.
        license: as the hub calls it, None where whoever shares the weights has to name one.
        folds: file of the folds that it was trained on, which is to lie beside the card as folds.json; None where there
            is none.
    """

    title: str
    model: dict[str, Any]
    checksum: str
    selection: str
    command: str | None = None
    dataset: str | None = None
    fingerprint: str | None = None
    scores: CardScores | None = None
    license: str | None = None
    folds: Path | None = None

    def __str__(self) -> str:
        parts = [self._front_matter(), self._introduction(), self._use(), self._evaluation(), self._training(), LIMITS]
        return "\n\n".join(parts) + "\n"

    @property
    def _metadata(self) -> dict[str, Any]:
        return self.model.get("metadata") or {}

    def _front_matter(self) -> str:
        content: dict[str, Any] = {} if self.license is None else {"license": self.license}
        content |= {
            "library_name": "uctrans",
            "pipeline_tag": TASK["type"],
            "tags": ["uctrans", self.model["name"].replace("_", "-"), "medical-imaging", "semantic-segmentation"],
        }
        if self.scores is not None:
            content["model-index"] = [{"name": self.title, "results": [self._result(self.scores)]}]
        text = import_extra("yaml", "training").safe_dump(content, sort_keys=False, allow_unicode=True)
        return f"---\n{NO_LICENSE if self.license is None else ''}{text}---"

    def _result(self, scores: CardScores) -> dict[str, Any]:
        name = self.dataset or "unnamed"
        dataset = {"type": _identifier(name), "name": name, "split": scores.split}
        if self.fingerprint is not None:
            dataset["args"] = {"fingerprint": self.fingerprint}
        metrics = []
        for key, title, mean, images in scores.defined():
            metrics.append(
                {
                    "type": key,
                    "name": f"{title}, single run, mean over {images} {scores.split} images",
                    "value": round(mean, DIGITS),
                }
            )
            if len(scores.runs.get(key, ())) > 1:
                average, deviation, number = mean_and_deviation(scores.runs[key])
                metrics.append(
                    {
                        "type": key,
                        "name": f"{title}, mean of {number} runs",
                        "value": round(average, DIGITS),
                        "args": {"runs": number, "standard_deviation": round(deviation, DIGITS)},
                    }
                )
        return {"task": TASK, "dataset": dataset, "metrics": metrics}

    def _introduction(self) -> str:
        shape = {key: value for key, value in self.model.items() if key not in ("name", "metadata", "backend")}
        settings = ", ".join(f"{key} {value}" for key, value in shape.items())
        data = "" if self.dataset is None else f', trained on the images of "{self.dataset}"'
        return (
            f"# {self.title}\n\n"
            f"A `{self.model['name']}` of uctrans for image segmentation{data}: {settings}.\n\n"
            f"SHA-256 of `model.safetensors`: `{self.checksum}`"
        )

    def _use(self) -> str:
        channels, classes = self.model.get("in_channels", "channels"), self.model.get("classes", "classes")
        flags = f" {self.scores.flags}" if self.scores is not None and self.scores.flags else ""
        return (
            f"## Use\n\n`{self.title}` is the folder that holds this file.\n\n"
            "```python\n"
            "import uctrans\n\n"
            f'model = uctrans.load_model("{self.title}")\n'
            f"logits = model(image)  # float (1, {channels}, height, width), 0 to 1 -> (1, {classes}, height, width)\n"
            "```\n\n"
            "```sh\n"
            f"uctrans predict -i images -o masks --model {shlex.quote(self.title)}{flags}\n"
            "```\n\n"
            "The command prepares images as training did; in Python that is "
            f'`uctrans.inference.load_predictor("{self.title}"{self._arguments()}).probabilities_of_image(image)`. '
            f'From the hub: `uctrans.load_model(huggingface_hub.snapshot_download("OWNER/{self.title}"))`.'
        )

    def _arguments(self) -> str:
        """The flags of prediction that ``load_predictor`` takes too, as its arguments."""
        words = shlex.split("" if self.scores is None else self.scores.flags)
        flags = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
        return "".join(f", {name}={flags[name]!r}" for name in OF_PREDICTOR if name in flags)

    def _evaluation(self) -> str:
        dice, epoch = self._metadata.get("best_dice"), self._metadata.get("best_epoch")
        validation = "" if dice is None else f" Its validation Dice in training is {dice:.4f}, after epoch {epoch}."
        lines = ["## Scores", "", f"{self.selection}{validation}", ""]
        if self.scores is None:
            return "\n".join([*lines, "Scores on test images are not known."])
        has_runs = any(len(values) > 1 for values in self.scores.runs.values())
        lines += [
            f"On the {self.scores.split} images, scored at {self.scores.scored_at}:",
            "",
            "| score | this run | images |" + (" all runs | runs |" if has_runs else ""),
            "| --- | ---: | ---: |" + (" ---: | ---: |" if has_runs else ""),
        ]
        for key, title, mean, images in self.scores.defined():
            line = f"| {title} | {_number(key, mean)} | {images} |"
            if has_runs:
                average, deviation, number = mean_and_deviation(self.scores.runs.get(key, []))
                several = f"{_number(key, average)} ± {_number(key, deviation)}" if number > 1 else "n/a"
                line += f" {several} | {number} |"
            lines.append(line)
        lines += ["", "This run: the mean over the images, of a single run."]
        if has_runs:
            lines += [
                "All runs: mean ± sample standard deviation of such means, over the runs of the same network and "
                "settings. That is what to expect of another training; this run is one of them."
            ]
        return "\n".join(lines)

    def _training(self) -> str:
        names = {
            "protocol": "protocol",
            "image_size": "image size",
            "channel_order": "channel order",
            "target": "target",
            "uctrans_version": "uctrans",
            "torch_version": "torch",
        }
        known = {title: self._metadata.get(name) for name, title in names.items()}
        known |= {"images": self.dataset, "fingerprint of their names and sizes": self.fingerprint}
        lines = [f"- {title}: {_plain(value)}" for title, value in known.items() if value is not None]
        if self.command is not None:
            lines += [
                "",
                "Trained as by this command, in which the words in capitals are to be filled in"
                + ("" if self.folds is None else f"; `{FOLDS}` lies beside this file")
                + ":",
                "",
                f"```sh\n{self.command}\n```",
            ]
        return "\n".join(["## Training", "", *(lines or ["Nothing is known of it."])])


LIMITS = """## Limits

- Scores, where there are any, are of images of one data set. Nothing was tried on images of another scanner, stain or
  magnification, where they may be much lower.
- Scores that were taken at different sizes do not compare: masks resized to few pixels are wider.
- For research. It is no medical device, and nothing here shows that it is fit for diagnosis.
- Whether the licence of the images reaches the weights is for whoever shares them to find out."""


def write_card(path: Path, card: ModelCard) -> str:
    """Write a card, atomically; return what is to be told of the one that was there, or "".

    A card that says the same already is left as it is, with whatever was added to it since. One that was edited, and of
    which the facts have changed, is kept beside the new one.
    """
    text, remark = str(card), ""
    if path.exists():
        former = path.read_text(encoding="utf-8", errors="replace")
        stamp = STAMP.search(former)
        if stamp is not None and stamp[1] == _digest(text):
            return ""
        if stamp is None or _digest(former[: stamp.start()]) != stamp[1]:
            names = (path.with_name(f"{path.stem}.former-{number}{path.suffix}") for number in count(1))
            kept = next(name for name in names if not name.exists())
            path.replace(kept)
            remark = f"{path} was edited and is out of date: it is kept as {kept.name}; carry over what is to stay"
    with written_atomically(path) as temporary:
        temporary.write_text(f"{text}\n<!-- uctrans {_digest(text)}{STAMP_NOTE} -->\n", encoding="utf-8")
    return remark


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _number(key: str, value: float) -> str:
    return f"{value:.2f}" if key == "hd95" else f"{value:.4f}"


def _plain(value: Any) -> str:
    return " x ".join(map(str, value)) + " pixels" if isinstance(value, list) else f"`{value}`"


def _identifier(name: str) -> str:
    """A name of a data set as the hub takes it: letters, digits and -_."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "unnamed"
