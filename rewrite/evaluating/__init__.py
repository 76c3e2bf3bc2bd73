"""What passes do to a model's answers: accuracy, agreement with the original, loss, multiply-adds and time, over a pass's parameter."""

from rewrite.evaluating.evaluate import Header, evaluate
from rewrite.evaluating.settings import Setting, settings
from rewrite.evaluating.task import Batch, Task, load_task

__all__ = ["Batch", "Header", "Setting", "Task", "evaluate", "load_task", "settings"]
