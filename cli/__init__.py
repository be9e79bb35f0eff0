"""The command line, imported as `qmoe_lite.cli`."""
