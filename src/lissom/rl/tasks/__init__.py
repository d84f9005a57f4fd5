"""Small worlds to learn from reward in: Countdown and arithmetic, with graders that a policy's text cannot harm."""

from lissom.rl.tasks.arithmetic import ArithmeticProblem, TwoDigitArithmetic
from lissom.rl.tasks.countdown import Countdown, CountdownProblem
from lissom.rl.tasks.expressions import NotArithmetic, evaluate
from lissom.rl.tasks.task import NumberTask

TASKS: dict[str, type[NumberTask]] = {task.name: task for task in (Countdown, TwoDigitArithmetic)}

__all__ = [
    "TASKS",
    "ArithmeticProblem",
    "Countdown",
    "CountdownProblem",
    "NotArithmetic",
    "NumberTask",
    "TwoDigitArithmetic",
    "evaluate",
]
