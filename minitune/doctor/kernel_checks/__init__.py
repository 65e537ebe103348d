"""Each family of kernels against its PyTorch reference, in the widths and the dtype of the model.

May import everything below commands/.
"""
