"""``tensorstore-fmt demo digits``: a small network in NumPy, watched by a second process."""

from tensorstore_fmt.demo.digits.conductor import run_demo

__all__ = ["run_demo"]
