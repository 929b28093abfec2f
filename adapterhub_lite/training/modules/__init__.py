"""Any other model: its own forward and autograd, with functions of ours where adapters stand."""
