"""What a pass says of how its parameters are fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Compared = Literal["output", "map"]
MapLoss = Literal["mse", "cross_entropy"]


@dataclass(frozen=True)
class Fitting:
    """How `rewrite.fit` trains the parameters that a pass adds.

    compares: what is brought close to the original's, site by site, before the model is trained end to end. "output": the output of the
    rewritten site, by the mean squared error over the mean square of what it should be. "map": what `Pass.attention_map` returns, by
    `map_loss`: the same relative error, or the cross-entropy of the rows of the maps, less the entropy of the original's (which is the
    Kullback-Leibler divergence). learning_rate: of Adam site by site, end_to_end_rate: of Adam end to end; both fall to zero along a half
    cosine. In n steps an entry moves by about n * rate / 2 at most, so what starts at zero and is of order one when it is learned needs
    rates of 1 / 100 for hundreds of steps, far above those of a model's own weights. Raises `ValueError` for other values.
    """

    compares: Compared = "output"
    map_loss: MapLoss = "mse"
    learning_rate: float = 1e-2
    end_to_end_rate: float = 1e-2

    def __post_init__(self) -> None:
        for name, options in (("compares", get_args(Compared)), ("map_loss", get_args(MapLoss))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r}; it is one of {', '.join(options)}")
        if not (self.learning_rate > 0 and self.end_to_end_rate > 0):
            raise ValueError(f"learning rates are above 0, not {self.learning_rate} and {self.end_to_end_rate}")
