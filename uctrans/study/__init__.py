"""Studies: several networks with the same training over seeds and folds, compared in a table and a chart."""

from .plan import ModelStudyConfig, SkipStudyConfig, StudyConfig, StudyError
from .run import StudyResult, study_models, study_skips

__all__ = [
    "ModelStudyConfig",
    "SkipStudyConfig",
    "StudyConfig",
    "StudyError",
    "StudyResult",
    "study_models",
    "study_skips",
]
