"""Layers over the operators: drop them into any U-Net."""

from .attention import ChannelAttention
from .backend import set_backend
from .blocks import ConvNormAct, DoubleConv, DownStage, Encoder
from .gate import ChannelGate
from .tokens import PatchEmbedding, Reconstruct
from .transformer import ChannelTransformer, TransformerLayer

__all__ = [
    "ChannelAttention",
    "ChannelGate",
    "ChannelTransformer",
    "ConvNormAct",
    "DoubleConv",
    "DownStage",
    "Encoder",
    "PatchEmbedding",
    "Reconstruct",
    "TransformerLayer",
    "set_backend",
]
