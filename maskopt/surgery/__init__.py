"""Operations on trained networks: parameters, optimizer state and freeze mask change together."""

from ._assign import assign as assign, reset as reset
from ._deepen import deepen as deepen
from ._grow import grow as grow
from ._head import replace_head as replace_head
from ._take import append as append, take as take
from ._transplant import transplant as transplant

__all__ = [
  "assign",
  "reset",
  "deepen",
  "grow",
  "replace_head",
  "append",
  "take",
  "transplant",
]
