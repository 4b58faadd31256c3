"""The command line: `vdcache`."""
