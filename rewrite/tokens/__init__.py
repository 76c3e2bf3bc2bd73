"""The token axis: which positions are visual, which grid they lie on, and selections pushed through a traced graph."""
