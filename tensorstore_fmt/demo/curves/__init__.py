"""``tensorstore-fmt demo curves``: trainings compared while they run, and the bad one stopped."""

from tensorstore_fmt.demo.curves.conductor import LEARNING_RATES, run_demo

__all__ = ["LEARNING_RATES", "run_demo"]
