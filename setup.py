"""Map the top-level folders to subpackages of `polygraft`; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("cluster", "grafts", "kernels", "launch", "serving", "trainers", "tuning")
FOUND = find_namespace_packages(include=[glob for f in FOLDERS for glob in (f, f"{f}.*")], exclude=["*.__pycache__"])

setup(
    packages=[f"polygraft.{package}" for package in FOUND],
    package_dir={f"polygraft.{f}": f for f in FOLDERS},
)
