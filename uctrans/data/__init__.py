"""Datasets: find, read, resize, augment, and prepare images and masks."""

from .augmentation import NativeAugmentation
from .demo import haematoxylin_image, write_demo_dataset
from .find import DataError, Sample, find_development_samples, find_images, find_samples
from .fingerprints import fingerprint
from .folds import find_split, load_folds, make_folds
from .instances import boundary_target
from .monuseg import Annotation, PreparedImage, fill_polygons, prepare_instances, prepare_monuseg, read_annotation
from .palettes import colours_to_labels, labels_to_colours, parse_palette
from .protocols import NativeProtocol, Protocol, get_protocol, list_protocols, protocol_of
from .read import read_image, read_mask
from .tensors import NativeImages, SegmentationTensors, load_native, load_tensors

__all__ = [
    "Annotation",
    "DataError",
    "NativeAugmentation",
    "NativeImages",
    "NativeProtocol",
    "PreparedImage",
    "Protocol",
    "Sample",
    "SegmentationTensors",
    "boundary_target",
    "colours_to_labels",
    "fill_polygons",
    "find_development_samples",
    "find_images",
    "find_samples",
    "find_split",
    "fingerprint",
    "get_protocol",
    "haematoxylin_image",
    "labels_to_colours",
    "list_protocols",
    "load_folds",
    "load_native",
    "load_tensors",
    "make_folds",
    "parse_palette",
    "prepare_instances",
    "prepare_monuseg",
    "protocol_of",
    "read_annotation",
    "read_image",
    "read_mask",
    "write_demo_dataset",
]
