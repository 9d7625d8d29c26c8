"""Layers over the operators: drop them into any U-Net."""

from .attention import ChannelAttention
from .blocks import ConvNormAct, ConvNormActPool, DeepestStage, DoubleConv, DoubleConvPool, DownStage, Encoder
from .checkpointing import set_checkpointing
from .folding import fold_batch_norms
from .gate import ChannelGate
from .nested import DualBranchDown, DualBranchEncoder, NestedU, U2DownBlock, U2UpBlock
from .switching import set_backend
from .tokens import PatchEmbedding, Reconstruct, pad_to_multiple
from .transformer import ChannelTransformer, TransformerLayer

__all__ = [
    "ChannelAttention",
    "ChannelGate",
    "ChannelTransformer",
    "ConvNormAct",
    "ConvNormActPool",
    "DeepestStage",
    "DoubleConv",
    "DoubleConvPool",
    "DownStage",
    "DualBranchDown",
    "DualBranchEncoder",
    "Encoder",
    "NestedU",
    "PatchEmbedding",
    "Reconstruct",
    "TransformerLayer",
    "U2DownBlock",
    "U2UpBlock",
    "fold_batch_norms",
    "pad_to_multiple",
    "set_backend",
    "set_checkpointing",
]
