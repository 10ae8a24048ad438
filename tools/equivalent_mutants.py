"""The mutants that survive tools/mutants.py, and why nothing can tell each from the code.

{module: {function: {the line as the mutant has it: reason}}}; the function of a class body or of
the module itself is "".
"""

REASONS: dict[str, dict[str, dict[str, str]]] = {}
