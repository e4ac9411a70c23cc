"""Every function of ``cnn_ext.functional`` that torch has too, against torch, over thousands of generated calls.

``draws.py`` draws a call from a number, ``expected.py`` computes what torch makes of it in float64, ``compare.py`` what
this package makes of it, in a process in which torch's own kernels raise. ``python -m tests.parity`` runs them.
"""
