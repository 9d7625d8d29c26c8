"""Recipes: ways to train one network, read from a YAML file, and the study that compares them."""

import dataclasses
import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from uctrans.extras import import_extra
from uctrans.study.config import SCORING, SET_BY_THE_STUDY, StudyConfig, StudyError, check_list, check_scoring
from uctrans.study.plan import Variant
from uctrans.training import ConfigError, TrainConfig

RECIPES_FOLDER = Path(__file__).parent / "recipes"
SAME_FOR_ALL = {  # settings that runs of a study must share, or that change no result
    *SET_BY_THE_STUDY, "data", "output", "classes", "class_names", "palette", "folds", "fold", "patience",
    "device", "threads", "progress", "save_minutes",
} - {"model"}  # fmt: skip
NAME = re.compile(r"\w[\w.-]*")

Recipes = dict[str, dict[str, Any]]


@dataclass
class RecipeStudyConfig(StudyConfig):
    """Settings of ``uctrans study recipes``: those of a training, each recipe's own values in place of some of them.

    Args:
        recipes: A shipped name, monuseg-224, or a YAML file. It maps the name of each recipe to its settings: those of
            uctrans train, and score_size, score_resolution and score_tta. The others are compared with the first. A
            recipe that differs from one before it in scoring alone takes that one's weights. In a study that goes on, a
            recipe with other settings than before needs another name.
    """

    recipes: str = "monuseg-224"

    set_by_the_study = tuple(name for name in SET_BY_THE_STUDY if name != "model")

    def __post_init__(self):
        super().__post_init__()
        for variant in self.variants():
            source = f"{self.recipes}: {variant.name}: "
            scoring = {name: value for name, value in variant.changes.items() if name in SCORING}
            check_scoring(self.scoring | scoring, source)
            try:
                self.run(variant, self.seed_list[0], self.fold_list()[0])
            except ConfigError as error:
                raise StudyError(f"{source}{error}") from error

    @property
    def baseline(self) -> str:
        """The first recipe, with which the others are compared."""
        return next(iter(self._loaded))

    @cached_property
    def _loaded(self) -> Recipes:
        return load_recipes(self.recipes)

    def variants(self) -> list[Variant]:
        """The recipes, in the order of the file."""
        variants: list[Variant] = []
        for name, settings in self._loaded.items():
            same = [other.name for other in variants if _of_training(other.changes) == _of_training(settings)]
            model = settings.get("model", self.model)
            options = settings.get("model_options", self.model_options)
            variants.append(Variant(name, model, options, changes=settings, trained_as=same[0] if same else None))
        return variants


def load_recipes(path_or_name: str | Path) -> Recipes:
    """Read recipes from a YAML file, or by name from those that come with the package ("monuseg-224").

    Raises:
        StudyError: there is no such file, it holds something else, or a setting that there is not or that a recipe
            cannot change.
    """
    path = Path(path_or_name)
    if not path.is_file():
        shipped = {file.stem: file for file in sorted(RECIPES_FOLDER.glob("*.yaml"))}
        if str(path_or_name) not in shipped:
            raise StudyError(
                f"recipes: {path} is neither a file nor one of those that come along: {', '.join(shipped)}"
            )
        path = shipped[str(path_or_name)]
    yaml = import_extra("yaml", "training")
    try:
        text = path.read_text(encoding="utf-8")
        content, node = yaml.safe_load(text), yaml.compose(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"recipes: {path} cannot be read as YAML ({error}); write it like monuseg-224.yaml") from error
    if not isinstance(content, dict) or not content:
        raise StudyError(f"recipes: {path} holds no recipes; write 'name: {{setting: value}}' lines")
    check_list(f"recipes: {path}", [key.value for key, _ in node.value], "name: {setting: value}")
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for name, settings in content.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise StudyError(f"recipes: {path}: {name!r} names a folder too; use letters, digits, _, - and .")
        if not isinstance(settings, dict):
            raise StudyError(f"recipes: {path}: {name} holds {settings!r}; write its settings, or {{}} for none")
        for setting in settings:
            _check_setting(f"recipes: {path}: {name}: {setting}", setting, [*known, *SCORING])
    return content


def _check_setting(place: str, setting: Any, known: list[str]) -> None:
    if setting not in known:
        near = difflib.get_close_matches(str(setting), known, n=1)
        raise StudyError(f"{place}: no such setting; " + (f"did you mean {near[0]}?" if near else "leave it out"))
    if setting in SAME_FOR_ALL:
        raise StudyError(f"{place}: is the same for all recipes; give it as a flag of the study")


def _of_training(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in SCORING}
