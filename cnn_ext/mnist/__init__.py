"""The lecture's CNN trained on handwritten digits: the ``cnn-ext`` command.

It uses nothing of this package but its public API.
"""
