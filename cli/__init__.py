"""The command line: one thin file a command.

Takes: arguments. Gives: one function call, rendered. Never: knows how anything is done.
"""

if __name__ == "cli":
    raise ImportError("this folder is the package adapterhub_lite.cli; import it by that name")
