"""Operations on trained networks: parameters, optimizer state and freeze mask change together."""

from ._assign import assign as assign, reset as reset
from ._grow import grow as grow
