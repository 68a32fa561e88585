"""The Mixture-of-Experts layer: router, dispatch, experts, combine, and their losses.

Dims, in this package's shapes:

    B  batch rows        S  tokens of a row (sequence)    M  model dim
    E  experts           K  experts per token (top-k)     H  hidden dim of an expert
    C  capacity: slots an expert has for one batch row, EC in all E experts
"""
