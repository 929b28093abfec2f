"""Bases: the frozen models that adapters change.

Takes: a base name, folder or Hub id, a quantisation and a device. Gives: `Base` (frozen model, tokenizer, fingerprint).
Never: lets an adapter choose what is loaded, runs remote code, reads a pickle.
"""
