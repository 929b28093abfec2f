"""The runtime: many adapters resident over one frozen base, switched by an index and mixed in one batch.

Takes: a base, references and inputs. Gives: texts, labels, logits.
Never: changes a weight of the base; a row sees its neighbours; a cache is keyed by a name (always by digest).
"""
