"""A data set of your own: rows made by a function, here sums to calculate.

    llamahome train examples.custom_dataset:sums --set data.validation_split=0

The same object goes into Python as `Extensions(data=sums())`, and into a package as an entry point of the group
`llamahome.datasets`. Rows are read more than once: give what can be iterated again, or the function that makes it.
"""

from __future__ import annotations


def sums() -> list[dict[str, str]]:
    """64 rows; their keys choose the schema, here `question` and `answer`."""
    return [{"question": f"What is {i} plus {i + 1}?", "answer": f"{2 * i + 1}"} for i in range(64)]
