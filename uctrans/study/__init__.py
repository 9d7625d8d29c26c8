"""Studies: several networks, or ways to train one, over several seeds, ending in a table and a bar chart."""

from uctrans.study.config import ModelStudyConfig, SkipStudyConfig, StudyConfig, StudyError
from uctrans.study.recipe import RecipeStudyConfig, load_recipes
from uctrans.study.runs import StudyResult, study_models, study_recipes, study_skips

__all__ = [
    "ModelStudyConfig",
    "RecipeStudyConfig",
    "SkipStudyConfig",
    "StudyConfig",
    "StudyError",
    "StudyResult",
    "load_recipes",
    "study_models",
    "study_recipes",
    "study_skips",
]
