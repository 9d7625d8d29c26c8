"""Studies: the same training for several networks over several seeds, ending in a table and a bar chart."""

from uctrans.study.config import ModelStudyConfig, SkipStudyConfig, StudyConfig, StudyError
from uctrans.study.runs import StudyResult, study_models, study_skips

__all__ = [
    "ModelStudyConfig",
    "SkipStudyConfig",
    "StudyConfig",
    "StudyError",
    "StudyResult",
    "study_models",
    "study_skips",
]
