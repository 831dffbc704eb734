"""Everything is declared in pyproject.toml; this file exists for the kernels' build (csrc/)."""

from setuptools import setup

setup()
