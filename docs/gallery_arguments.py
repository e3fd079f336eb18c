"""What an example of the gallery finds when it starts: its file, its docstring, the arguments of its short version."""

import ast


def quick(gallery_conf: dict, script_vars: dict) -> list[str]:
    """The arguments; sphinx-gallery leaves `__file__` and `__doc__` out of a script's globals."""
    with open(script_vars["src_file"]) as file:
        source = file.read()
    script_vars["example_globals"] |= {
        "__file__": script_vars["src_file"],
        "__doc__": ast.get_docstring(ast.parse(source)),
    }
    return ["--quick"] if '"--quick"' in source else []
