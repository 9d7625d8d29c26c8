"""Datasets: find, read, resize, augment, and prepare images and masks."""

from uctrans.data.aperio import Annotation, fill_polygons, read_annotation
from uctrans.data.boundary import boundary_target
from uctrans.data.demo import write_demo_dataset
from uctrans.data.errors import DataError
from uctrans.data.files import Sample, find_development_samples, find_images, find_samples
from uctrans.data.folds import find_split, load_folds, make_folds
from uctrans.data.images import read_image, read_mask
from uctrans.data.monuseg import PreparedImage, prepare_instances, prepare_monuseg
from uctrans.data.native import NativeImages, load_native
from uctrans.data.native_augmentation import NativeAugmentation
from uctrans.data.palettes import colours_to_labels, labels_to_colours, parse_palette
from uctrans.data.protocols import NativeProtocol, Protocol, get_protocol, list_protocols, protocol_of
from uctrans.data.tensors import SegmentationTensors, load_tensors

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
    "get_protocol",
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
