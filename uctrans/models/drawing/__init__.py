"""Pictures and tables of the networks, made from the code; ``make pictures`` writes those of docs/models.md."""

from .svg import draw
from .tables import table, with_tables
from .trace import trace_model

__all__ = ["draw", "table", "trace_model", "with_tables"]
