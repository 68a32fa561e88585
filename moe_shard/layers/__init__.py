"""Build a decoder from everything but its MoE layer: norms, attention, embedding, MLP.

Dims, in this package's shapes:

    B  sequences       S  tokens each          M  model dim      F  hidden dim of a dense MLP
    N  query heads     J  key/value heads      D  head dim       V  vocabulary
"""
