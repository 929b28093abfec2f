"""Decoders built as Llama is: gradients by hand, in torch operations, natively, and on CUDA."""
