"""Configuration of the `sim2real` command: plain dataclasses, composed by Hydra."""
