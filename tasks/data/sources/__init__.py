"""Where rows come from: `parts` finds files, `opening` opens them, each format has its module, `fields` makes rows.

An adapter is a function of a part (or a folder) that yields `Record`s in order, each with how many bytes are read.
"""
