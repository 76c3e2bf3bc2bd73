"""From the attention IR to code: Triton source, ahead-of-time compilation, the registered operators and their CPU lowering."""

from codegen import flops as _flops  # registers the FLOP formulas
from codegen.compilation import TARGETS, CompiledKernel
from codegen.kernel import Kernel, emit, has_triton_form
from codegen.masks import visible_pairs
from codegen.operator import attend
from codegen.statistics_operator import statistic

__all__ = ["TARGETS", "CompiledKernel", "Kernel", "attend", "emit", "has_triton_form", "statistic", "visible_pairs"]

del _flops
