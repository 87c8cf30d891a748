"""``tensorstore-fmt demo``: a real training into a run, watched while it goes on."""

from tensorstore_fmt.demo.conductor import run_demo

__all__ = ["run_demo"]
