"""One file for each family of formats in which a paper's repository published whole models.

A file has `LAYOUTS`, a tuple of `base.Layout`: how a format is called, recognised, and put into our terms. Most are
made by `base.whole_model` from names and rules. `gloria_core.checkpoints.published` tries them all; a new format is
one new file here.
"""
