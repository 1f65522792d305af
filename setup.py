"""All metadata is in pyproject.toml; this file is where the compiled library will be declared."""

from setuptools import setup

setup()
