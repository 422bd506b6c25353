"""The tests on the newest and on the lowest versions that the requirements admit, on each Python.

    pip install "nox[uv]" && nox
    nox -s "tests-3.11(lowest)" -- -m "not slow"        # one of them; the rest is for pytest

Each takes 7 GB. CI (.ci/run) has the newest versions, on its own Python.
"""

import nox

nox.options.default_venv_backend = "uv"     # pip cannot choose the lowest versions
nox.options.download_python = "never"       # a Python that is missing is skipped


# --seed: torch.compile needs setuptools.
@nox.session(python=["3.11", "3.12", "3.13", "3.14"], venv_params=["--seed"])
@nox.parametrize("resolution", ["highest", "lowest-direct"], ids=["newest", "lowest"])
def tests(session: nox.Session, resolution: str) -> None:
    """Run pytest."""
    # The lowest of which there are wheels for this Python; strconv, which exman needs, has none.
    session.install("--resolution", resolution, "--only-binary", ":all:", "--no-binary", "strconv",
                    "-r", "requirements-dev.txt")
    session.run("python", "-m", "pytest", *session.posargs)
