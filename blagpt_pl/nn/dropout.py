"""Dropout: in training, elements are zeroed at random and the others made larger, so that the mean stays.

Source   Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting"
Formula  y_i = x_i m_i / (1 - p), m_i ~ Bernoulli(1 - p); y = x in evaluation
Cost     the mask's memory; nothing where p = 0
"""

from torch import nn

from blagpt_pl.nn.checks import probability


def dropout(socket: str, p: float) -> nn.Module:
    """torch's dropout, or nothing where nothing is dropped.

    Args:
        socket: where it is set, for the error.
        p: probability of dropping an element.
    """
    return nn.Dropout(p) if probability(socket, p) else nn.Identity()
