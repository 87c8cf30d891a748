"""Which Python a contestant runs in: this one or the one its packages were put in."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from suite.contestant import Contestant

_PROBE = """
import importlib.metadata, importlib.util, json, sys
modules, distributions = json.loads(sys.argv[1])
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
def is_there(module):
    parents = module.split(".")[:-1]  # without them, to look for it raises
    return (not parents or is_there(".".join(parents))) and importlib.util.find_spec(module)
missing = [m for m in modules if not is_there(m)]
versions = {d: version(d) for d in distributions}
if "tensorstore_fmt" in modules and not missing:
    from tensorstore_fmt.format import kernel
    versions["kernel"] = kernel.describe()["uses"]
print(json.dumps({"python": sys.version.split()[0], "missing": missing, "versions": versions}))
"""


@functools.cache
def _probe(
    python: str,
    modules: tuple[str, ...],
    distributions: tuple[str, ...],
    variables: tuple[tuple[str, str], ...],
) -> dict:
    done = subprocess.run(
        [python, "-c", _PROBE, json.dumps([modules, distributions])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **dict(variables)},
    )
    return json.loads(done.stdout)


class Pythons:
    """The environments that `environments.py` made, and the Python that runs the suite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _candidates(self, environment: str) -> list[str]:
        names = {"ours": ["peers"]}.get(environment, [environment])
        made = [str(self.folder / name / "bin" / "python") for name in names]
        own = [] if environment.startswith("smdebug") else [sys.executable]
        # The peers' environment first: there all contestants meet the same NumPy.
        return [p for p in made if os.access(p, os.X_OK)] + own

    def of(self, environment: str) -> str:
        """Give the Python of an environment, or this one where that is not made."""
        return self._candidates(environment)[0]

    def find(self, contestant: type[Contestant]) -> tuple[str, dict] | str:
        """Give the Python for a contestant and the versions there, or say what is missing."""
        missing = "its environment is not made"
        variables = tuple(sorted(contestant.variables.items()))
        for python in self._candidates(contestant.environment):
            found = _probe(python, contestant.needs, contestant.distributions, variables)
            if not found["missing"]:
                return python, {"python": found["python"], **found["versions"]}
            missing = f"not installed: {', '.join(found['missing'])}"
        return missing
