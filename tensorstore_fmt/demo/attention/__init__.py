"""``tensorstore-fmt demo attention``: a transformer learns, and one head of it is looked at.

`run_demo` needs no package of the extra before it is called.
"""

from tensorstore_fmt.demo.attention.conductor import run_demo

__all__ = ["run_demo"]
