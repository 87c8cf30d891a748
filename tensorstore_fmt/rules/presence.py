"""Who still writes to a run: a writer that died cannot say so, but its lock does."""

from __future__ import annotations

from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.run import Run

__all__ = ["lost_writers"]


def lost_writers(run: Run) -> list[str]:
    """Give the writers that died without closing the run, if nobody is left who writes to it.

    Looks at the locks of the newest attempt, as the run was when it was last refreshed.

    Returns
    -------
    list of str
        Empty if one of them lives, if all have closed, and where nobody can tell: in an object
        store, and on a file system without locks.
    """
    view = run._session.view
    open_ = [
        writer.key
        for writers in view.newest_writers.values()
        for writer in writers
        if not writer.is_closed
    ]
    storage = run._session.storage
    if not all(storage.is_abandoned(layout.lock_path(key)) for key in open_):
        return []
    return [str(key) for key in open_]
