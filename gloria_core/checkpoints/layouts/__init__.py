"""One file for each family of formats in which a paper's repository published whole models.

A layout is a module with
- `NAME`: what people call the format, for messages;
- `recognise(shapes, stored) -> bool`: whether the tensors of a file (names -> shapes) and its stored configuration are
  of this layout, from names that no other layout has;
- `translate(tensors, stored) -> Translation`: the architecture to build and the place of every tensor. Raises KeyError
  for a tensor that the architecture cannot be read without, and ValueError for one that is not supported.

`gloria_core.checkpoints.published` tries them all; a new format is one new file here.
"""
