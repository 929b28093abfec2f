"""Foreign and own file formats, read strictly and without torch.

Takes: bytes or paths of adapter configs, safetensors files and cards.
Gives: frozen typed specs, headers, inventories and cards; or one error that lists everything wrong.
Never: executes, unpickles, compiles a foreign regular expression, writes, or changes what it read.
"""
