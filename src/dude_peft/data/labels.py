"""The one constant that the data room and the losses share."""

IGNORE = -100
"""The label of a position that is not learned, in transformers' convention."""
