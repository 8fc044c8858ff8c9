"""Tensors in, tensors out: the operations, and `backend_for(device)`, which picks their fastest form."""
