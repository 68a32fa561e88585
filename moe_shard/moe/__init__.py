"""Provide the Mixture-of-Experts layer: router, dispatch, experts, combine, and their losses.

Dims, in this package's shapes:

    B  sequences of a batch    S  tokens of a sequence          M  model dim
    E  experts                 K  experts per token (top-k)     H  hidden dim of an expert
    C  capacity: slots that an expert has for one sequence, EC in all E experts
"""
