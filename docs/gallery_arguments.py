"""Command-line arguments of the examples when the gallery is built."""


def quick(gallery_conf: dict, script_vars: dict) -> list[str]:
    """The short version of every example that has one."""
    with open(script_vars["src_file"]) as source:
        return ["--quick"] if '"--quick"' in source.read() else []
