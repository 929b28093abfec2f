"""Encoders built as BERT is: gradients by hand, layer by layer or all layers in one native call."""
