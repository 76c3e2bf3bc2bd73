"""From the attention IR to code: Triton source, ahead-of-time compilation, the registered operators and their CPU lowering."""

from codegen import flops as _flops  # registers the FLOP formulas
from codegen.backward_kernel import BackwardKernel, emit_backward, has_triton_backward
from codegen.block_choice import visited_pairs
from codegen.compilation import TARGETS, CompiledKernel
from codegen.kernel import Kernel, emit, has_triton_form
from codegen.masks import visible_pairs
from codegen.multiply_adds import computed_multiply_adds, multiply_adds_formula
from codegen.operator import attend
from codegen.packed import packed, segment_ids
from codegen.recurrence import recurrent, without_recurrence
from codegen.served import kernel_attention, reason_without_backward, reason_without_kernel
from codegen.state_kernels import StateKernel, emit_state, has_triton_state
from codegen.statistics_operator import statistic
from codegen.tuning import Autotuning
from codegen.work import SKELETONS, Work, work

__all__ = [
    "SKELETONS",
    "TARGETS",
    "Autotuning",
    "BackwardKernel",
    "CompiledKernel",
    "Kernel",
    "StateKernel",
    "Work",
    "attend",
    "computed_multiply_adds",
    "emit",
    "emit_backward",
    "emit_state",
    "has_triton_backward",
    "has_triton_form",
    "has_triton_state",
    "kernel_attention",
    "multiply_adds_formula",
    "packed",
    "reason_without_backward",
    "reason_without_kernel",
    "recurrent",
    "segment_ids",
    "statistic",
    "visible_pairs",
    "visited_pairs",
    "without_recurrence",
    "work",
]

del _flops
