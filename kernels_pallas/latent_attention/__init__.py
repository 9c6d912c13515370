"""Expanded M²LA attention, for training and prefill."""
