"""Scores, prediction on image files, and export of trained models."""

from .comparison import EvaluateConfig
from .evaluate import EvaluationResult, evaluate
from .export import ExportConfig, ExportError, export
from .figures import comparison_figure, overlay
from .metrics import dice, hd95, iou, mean_and_deviation, mean_over_classes
from .predict import PredictConfig, PredictionError, WrittenFiles, predict
from .predictor import Ensemble, Predictor, load_predictor
from .settings import InferenceError

__all__ = [
    "Ensemble",
    "EvaluateConfig",
    "EvaluationResult",
    "ExportConfig",
    "ExportError",
    "InferenceError",
    "PredictConfig",
    "PredictionError",
    "Predictor",
    "WrittenFiles",
    "comparison_figure",
    "dice",
    "evaluate",
    "export",
    "hd95",
    "iou",
    "load_predictor",
    "mean_and_deviation",
    "mean_over_classes",
    "overlay",
    "predict",
]
