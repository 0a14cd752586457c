"""Benchmarks of aidb-ray: `python -m benchmarks NAME`; `--help` lists the names."""
