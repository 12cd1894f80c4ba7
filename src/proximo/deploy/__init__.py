"""Policies outside Proximo: one file that maps an environment's observations to its actions, in several formats.

`description.py` describes a policy in plain values and arrays, from which each format is written. `runtime.py` computes
it with NumPy alone; its text is the code of the exported Python file.
"""
