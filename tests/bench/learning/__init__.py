"""Benchmarks of learning: LOM against other methods, on the same rows, with the same gradient steps.

    python -m tests.bench.learning --tasks fork bandit4 --methods lom td3_bc --seeds 0:5
    python -m tests.bench.learning report

tasks.py says what is learned from, methods.py by what; d3rlpy_trainer.py runs in an environment of its own and hands
policies back; trial.py trains and evaluates; runner.py does what is missing; results.py keeps it; report.py and
pictures.py show it.
"""
