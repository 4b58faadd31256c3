"""`python -m vdcache` is the command `vdcache`."""

from vdcache.cli import app

app(prog_name="vdcache")
