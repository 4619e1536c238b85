"""Benchmarks of this repository, each against its baseline in the same run: ``python -m bench [NAME ...] [--quick]``.

A benchmark is a module with ``run(quick) -> Result``. Nothing here is part of the installed package.
"""
