"""`maxstack bench kernels --tune`: sizes of blocks tried on the machine at hand, the best kept in the user's table.

`command` is the verb, `search` looks for the sizes of one kernel, `race` times a candidate beside the default,
`results` compares what they compute, `kept` writes the table.
"""
