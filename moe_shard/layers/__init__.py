"""The decoder's building blocks other than the MoE layer.

Dims, in this package's shapes:

    B  batch rows      S  tokens of a row      M  model dim      F  hidden dim of a dense MLP
    N  query heads     J  key/value heads      D  head dim       V  vocabulary
"""
