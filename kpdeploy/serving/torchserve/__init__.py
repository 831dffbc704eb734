"""The target torchserve: archives (.mar) that need nothing of this package, and a real TorchServe to serve them."""
