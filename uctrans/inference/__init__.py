"""Scores, prediction on image files, and export of trained models."""

from uctrans.inference.ensemble import Ensemble
from uctrans.inference.evaluate import EvaluateConfig, EvaluationResult, evaluate
from uctrans.inference.export import ExportConfig, export
from uctrans.inference.export_checks import ExportError
from uctrans.inference.figures import comparison_figure
from uctrans.inference.files import InferenceError
from uctrans.inference.metrics import dice, hd95, iou, mean_and_deviation, mean_over_classes
from uctrans.inference.overlays import overlay
from uctrans.inference.predict import PredictConfig, PredictionError, predict
from uctrans.inference.predictor import Predictor, load_predictor

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
